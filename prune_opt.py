"""Prune a language model under a MAC budget; `python prune_opt.py --help` lists the options."""

from shrinkformer.commands.main import prune_opt

if __name__ == "__main__":
    raise SystemExit(prune_opt())
