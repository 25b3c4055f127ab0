"""GPTQ-style quantization (not built yet; see the issues)."""
