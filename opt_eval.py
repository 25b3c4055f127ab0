"""Perplexity of a language model on every corpus; `python opt_eval.py --help` lists the options."""

from shrinkformer.commands.opt_eval import main

if __name__ == "__main__":
    raise SystemExit(main())
