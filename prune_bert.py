"""Prune an encoder under a MAC budget; `python prune_bert.py --help` lists the options."""

from shrinkformer.commands.prune_bert import main

if __name__ == "__main__":
    raise SystemExit(main())
