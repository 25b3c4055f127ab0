"""Make a trained transformer really smaller and faster under a MAC budget, without retraining.

>>> import shrinkformer
>>> plan = shrinkformer.prune_(model, loader, shrinkformer.PruneConfig(mu=0.5))   # doctest: +SKIP
>>> shrinkformer.save(model, "smaller", plan=plan)   # doctest: +SKIP
>>> model = shrinkformer.load("smaller")   # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shrinkformer.api import PruneCallback as PruneCallback
    from shrinkformer.api import PruneConfig as PruneConfig
    from shrinkformer.api import prune_ as prune_
    from shrinkformer.prune.budget import Budget as Budget
    from shrinkformer.prune.checkpoint import save as save
    from shrinkformer.prune.plan import Plan as Plan
    from shrinkformer.prune.pruner import Calibrated as Calibrated
    from shrinkformer.prune.pruner import calibrate as calibrate
    from shrinkformer.prune.pruner import prune_model as prune_model
    from shrinkformer.prune.result import Pruned as Pruned
    from shrinkformer.prune.shrink_config import ShrinkConfig as ShrinkConfig
    from shrinkformer.quantize.checkpoint import load as load
    from shrinkformer.quantize.config import QuantizeConfig as QuantizeConfig
    from shrinkformer.quantize.quantizer import quantize_ as quantize_
    from shrinkformer.utils.upload import push_to_hub as push_to_hub

# Imported on first use: `import shrinkformer` must not take the seconds that torch and transformers take.
_EXPORTS = {
    "PruneCallback": "shrinkformer.api",
    "PruneConfig": "shrinkformer.api",
    "prune_": "shrinkformer.api",
    "Budget": "shrinkformer.prune.budget",
    "Calibrated": "shrinkformer.prune.pruner",
    "Plan": "shrinkformer.prune.plan",
    "Pruned": "shrinkformer.prune.result",
    "calibrate": "shrinkformer.prune.pruner",
    "ShrinkConfig": "shrinkformer.prune.shrink_config",
    "QuantizeConfig": "shrinkformer.quantize.config",
    "load": "shrinkformer.quantize.checkpoint",
    "prune_model": "shrinkformer.prune.pruner",
    "push_to_hub": "shrinkformer.utils.upload",
    "quantize_": "shrinkformer.quantize.quantizer",
    "save": "shrinkformer.prune.checkpoint",
}

__all__ = [
    "Budget",
    "Calibrated",
    "Plan",
    "PruneCallback",
    "PruneConfig",
    "Pruned",
    "QuantizeConfig",
    "ShrinkConfig",
    "calibrate",
    "load",
    "prune_",
    "prune_model",
    "push_to_hub",
    "quantize_",
    "save",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "api":  # a module of names that are not repeated here
        return importlib.import_module("shrinkformer.api")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
