"""Perplexity of a language model on every corpus; `python opt_eval.py --help` lists the options."""

from shrinkformer.commands.main import opt_eval

if __name__ == "__main__":
    raise SystemExit(opt_eval())
