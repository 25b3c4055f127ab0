"""What the algorithms know about an architecture: one frozen record per ``config.model_type``.

A record holds dotted module paths and config names, no code. To support a new family, add a record to the module of
its kind and its ``model_type`` to the shared test in ``tests/test_architectures.py``.
"""

from shrinkformer.architectures.decoders import DECODERS
from shrinkformer.architectures.encoders import ENCODERS
from shrinkformer.architectures.projection import Projection
from shrinkformer.architectures.record import Architecture, AttentionRecord, FeedForwardRecord, StockRecord
from shrinkformer.architectures.views import (
    ARCHITECTURES,
    LayerView,
    find_architecture,
    layer_views,
    require_alike,
    unit_columns,
)

__all__ = [
    "ARCHITECTURES",
    "DECODERS",
    "ENCODERS",
    "Architecture",
    "AttentionRecord",
    "FeedForwardRecord",
    "LayerView",
    "Projection",
    "StockRecord",
    "find_architecture",
    "layer_views",
    "require_alike",
    "unit_columns",
]
