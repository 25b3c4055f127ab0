"""Quantize a language model, alone or after pruning; `python quantize_opt.py --help` lists the options."""

from shrinkformer.commands.quantize_opt import main

if __name__ == "__main__":
    raise SystemExit(main())
