"""Quantize a language model, alone or after pruning; `python quantize_opt.py --help` lists the options."""

from shrinkformer.commands.main import quantize_opt

if __name__ == "__main__":
    raise SystemExit(quantize_opt())
