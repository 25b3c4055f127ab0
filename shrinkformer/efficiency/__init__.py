"""MACs, parameters, latency and memory."""
