"""``quantize_bert.py``, the old name of ``shrinkformer quantize`` for encoders."""

from shrinkformer.commands.main import quantize_bert as main

__all__ = ["main"]
