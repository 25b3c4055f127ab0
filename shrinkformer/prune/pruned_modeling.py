"""Pruned transformers as ordinary classes of transformers.

Every checkpoint that shrinkformer writes holds a copy of this file, so it must import nothing but torch and
transformers. It turns a stock class into one whose blocks have the sizes in ``config.per_layer_config``: this file's
``BertForQuestionAnswering`` is that of transformers with smaller linear layers, nothing else. The names are the same,
because pipelines, trainers and exporters look at them. The classes are made on demand (PEP 562), because the set of stock
classes is not ours to list.
"""

from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def set_block_sizes(block: nn.Module, architecture: dict[str, Any], heads: int, neurons: int) -> None:
    """Give one block new, uninitialised linear layers of the given sizes, and matching head attributes.

    Args:
        block: A transformer block; changed in place.
        architecture: The architecture record as a dictionary: paths and attribute names.
        heads: Number of attention heads, at least 1.
        neurons: Number of feed-forward neurons, at least 1.
    """
    attention, feed_forward = architecture["attention"], architecture["feed_forward"]
    module = block.get_submodule(attention["module"])
    width = heads * int(getattr(module, attention["head_size_attribute"]))
    for name in ("query", "key", "value"):
        _resize_linear(block, attention[name], out_features=width)
    _resize_linear(block, attention["output"], in_features=width)
    for path in feed_forward["inputs"]:
        _resize_linear(block, path, out_features=neurons)
    _resize_linear(block, feed_forward["output"], in_features=neurons)
    for name in attention["heads_attributes"]:
        setattr(module, name, heads)
    for name in attention["width_attributes"]:
        setattr(module, name, width)


def _resize_linear(
    block: nn.Module, path: str, *, in_features: int | None = None, out_features: int | None = None
) -> None:
    old = block.get_submodule(path)
    assert isinstance(old, nn.Linear)
    new = nn.Linear(
        in_features if in_features is not None else old.in_features,
        out_features if out_features is not None else old.out_features,
        bias=old.bias is not None,
        device="meta",  # no random numbers are drawn: the weights come from the checkpoint or from the surgery
        dtype=old.weight.dtype,
    ).to_empty(device=old.weight.device)
    new.weight.requires_grad_(old.weight.requires_grad)
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, new)


def resize_model(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give every block of a model the sizes in ``config.per_layer_config``; in place."""
    architecture = config.shrinkformer["architecture"]
    blocks: Any = model.base_model.get_submodule(architecture["layers"])
    for block, sizes in zip(blocks, config.per_layer_config, strict=True):
        set_block_sizes(
            block, architecture, getattr(sizes, architecture["heads_key"]), getattr(sizes, architecture["neurons_key"])
        )


def pruned_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that loads pruned checkpoints of a stock class, such as ``BertModel``."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        # Stock code reads one global size per config; it must see the sizes before pruning while it builds its modules.
        overrides = config.to_dict().get("per_layer_config")
        config.per_layer_config = None
        try:
            stock.__init__(self, config, *args, **kwargs)
        finally:
            config.per_layer_config = overrides
        if overrides:
            resize_model(self, config)

    # ``__module__`` must be this file: ``save_pretrained`` copies the file of the class into the new checkpoint.
    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": __name__})


def __getattr__(name: str) -> Any:
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = pruned_class(stock)
    return made


__all__ = ["pruned_class", "resize_model", "set_block_sizes"]
