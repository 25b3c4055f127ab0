"""Quantize an encoder, alone or after pruning; `python quantize_bert.py --help` lists the options."""

from shrinkformer.commands.main import quantize_bert

if __name__ == "__main__":
    raise SystemExit(quantize_bert())
