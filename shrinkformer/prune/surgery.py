"""Make a block really smaller."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shrinkformer.architectures import LayerView, Projection, layer_views
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.pruned_modeling import set_block_sizes
from shrinkformer.prune.refit import Consumer


@dataclass(frozen=True)
class Weights:
    """Of a linear layer.

    Attributes:
        weight: ``(outputs, inputs)``, of any floating type.
        bias: ``(outputs,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def rows(cls, linear: Projection, kept: Tensor) -> "Weights":
        """Some outputs of a layer, ``kept`` is ``(rows,)`` int64."""
        kept = kept.to(linear.weight.device)
        return cls(linear.weight[kept], None if linear.bias is None else linear.bias[kept])

    def mixed(self, bases: Sequence[Tensor]) -> "Weights":
        """Equal parts of the outputs, each multiplied by a matrix ``(part, new width)``; float64."""
        parts = self.weight.double().chunk(len(bases))
        weight = torch.cat([basis.T @ part for basis, part in zip(bases, parts, strict=True)])
        if self.bias is None:
            return Weights(weight, None)
        biases = self.bias.double().chunk(len(bases))
        return Weights(weight, torch.cat([part @ basis for basis, part in zip(bases, biases, strict=True)]))


def with_blocks(model: PreTrainedModel, blocks: Sequence[nn.Module], config: PreTrainedConfig) -> PreTrainedModel:
    """A copy of a model with other blocks, and with the configuration that they refer to."""
    replaced = {id(view.block): block for view, block in zip(layer_views(model), blocks, strict=True)}
    # What deepcopy finds in its memo it takes for copied: everything but blocks and configuration is copied.
    return copy.deepcopy(model, {**replaced, id(model.config): config})


def take_blocks(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Give a model the blocks of its smaller copy, in place; everything around them stays the same objects."""
    for old, new in zip(layer_views(model), layer_views(smaller), strict=True):
        for module in new.block.modules():
            if getattr(module, "config", None) is smaller.config:
                module.config = model.config
        model.base_model.set_submodule(f"{old.architecture.layers}.{old.index}", new.block)


@torch.no_grad()
def remove_heads(view: LayerView, kept: Tensor, consumer: Consumer) -> None:
    """Remove the heads of a block that are not kept; in place.

    Args:
        view: The block.
        kept: Indices of the heads that stay, ``(heads,)`` int64.
        consumer: Weights of the output projection for the heads that stay.
    """
    filling = {path: Weights.rows(view.linear(path), rows) for path, rows in view.head_rows(kept).items()}
    filling[view.architecture.attention.output] = Weights(consumer.weight, consumer.bias)
    rebuild(view, replace(layer_sizes([view])[0], heads=len(kept)), filling)


@torch.no_grad()
def remove_neurons(view: LayerView, kept: Tensor, consumer: Consumer) -> None:
    """Remove the neurons of a block that are not kept; in place.

    Args:
        view: The block.
        kept: Indices of the neurons that stay, ``(neurons,)`` int64.
        consumer: Weights of the second feed-forward layer for the neurons that stay.
    """
    feed_forward = view.architecture.feed_forward
    filling = {path: Weights.rows(view.linear(path), kept) for path in feed_forward.inputs}
    filling[feed_forward.output] = Weights(consumer.weight, consumer.bias)
    rebuild(view, replace(layer_sizes([view])[0], neurons=len(kept)), filling)


def kept_sizes(size: LayerSize) -> dict[str, int]:
    """What ``set_block_sizes`` needs to know of a block beside its stock class; checkpoints hold it."""
    return {name: getattr(size, name) for name in ("heads", "neurons", "query_width", "value_width")}


@torch.no_grad()
def rebuild(view: LayerView, size: LayerSize, filling: Mapping[str, Weights]) -> None:
    """Resize a block as the checkpoint loader does, then fill every layer with its old or new weights; in place.

    Args:
        view: The block.
        size: What it becomes.
        filling: New weights of the layers whose size changes, by path.
    """
    record = view.architecture
    paths = (*record.attention.producers, record.attention.output, *record.feed_forward.inputs)
    linears = {path: view.linear(path) for path in (*paths, record.feed_forward.output)}
    filled = {path: Weights(linear.weight, linear.bias) for path, linear in linears.items()} | dict(filling)
    set_block_sizes(view.block, record.to_dict(), **kept_sizes(size))
    for path, new in filled.items():
        linear = view.linear(path)
        linear.weight.copy_(new.weight)
        if linear.bias is not None and new.bias is not None:
            linear.bias.copy_(new.bias)
