"""What the algorithms know about an architecture: one frozen record per ``config.model_type``.

A record holds dotted module paths and config names, no code. To support a new family, add a record to the module of
its kind and its ``model_type`` to the shared test in ``tests/test_architectures.py``.
"""

from shrinkformer.architectures.encoders import ENCODERS
from shrinkformer.architectures.record import Architecture, AttentionRecord, FeedForwardRecord
from shrinkformer.architectures.views import LayerView, find_architecture, layer_views

__all__ = [
    "ENCODERS",
    "Architecture",
    "AttentionRecord",
    "FeedForwardRecord",
    "LayerView",
    "find_architecture",
    "layer_views",
]
