"""``opt_eval.py``, the old name of ``shrinkformer evaluate`` for language models."""

from shrinkformer.commands.main import opt_eval as main

__all__ = ["main"]
