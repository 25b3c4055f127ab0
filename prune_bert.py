"""Prune an encoder under a MAC budget; `python prune_bert.py --help` lists the options."""

from shrinkformer.commands.main import prune_bert

if __name__ == "__main__":
    raise SystemExit(prune_bert())
