"""Models that transformers has for a family, without weights and with one block: what stands around the blocks."""

import copy
import importlib

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging


def stock_classes(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """The models of transformers for the family of a configuration, with all kinds of heads and without one."""
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    named = (getattr(module, name) for name in module.__all__ if not name.endswith("PreTrainedModel"))
    return [kind for kind in named if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]


def outline(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of one block and without weights: everything around the blocks is as in the whole one."""
    own = copy.deepcopy(config)
    own.per_layer_config = None
    own.shrinkformer = None
    own._attn_implementation = "eager"  # another one might be looked for, even on the hub
    if getattr(own, "layer_types", None):
        own.layer_types = own.layer_types[:1]
    own.num_hidden_layers = 1
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # some say how they are meant to be used
    try:
        with torch.device("meta"):
            return kind(own)
    finally:
        logging.set_verbosity(verbosity)


def stock_heads(config: PreTrainedConfig) -> set[str]:
    """Names of the modules that stand beside the base model in some model of the family."""
    models = [outline(kind, config) for kind in stock_classes(config)]
    return {
        name
        for model in models
        if model.base_model is not model
        for name, _ in model.named_children()
        if name != model.base_model_prefix
    }
