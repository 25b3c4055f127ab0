"""Quantize an encoder, alone or after pruning; `python quantize_bert.py --help` lists the options."""

from shrinkformer.commands.quantize_bert import main

if __name__ == "__main__":
    raise SystemExit(main())
