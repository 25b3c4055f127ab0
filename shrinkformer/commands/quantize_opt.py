"""``quantize_opt.py``, the old name of ``shrinkformer quantize`` for language models."""

from shrinkformer.commands.main import quantize_opt as main

__all__ = ["main"]
