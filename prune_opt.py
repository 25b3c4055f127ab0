"""Prune a language model under a MAC budget; `python prune_opt.py --help` lists the options."""

from shrinkformer.commands.prune_opt import main

if __name__ == "__main__":
    raise SystemExit(main())
