"""Which units of a sublayer stay, with the weights that the others left behind; kept on disk for interrupted runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.architectures import LayerView
from shrinkformer.prune.plan import LayerPlan
from shrinkformer.prune.refit import Consumer
from shrinkformer.prune.resume import WeightFiles

_HEADS, _NEURONS = "heads", "neurons"


@dataclass(frozen=True)
class Choice:
    """Of one sublayer.

    Attributes:
        kept: Indices of the heads or neurons that stay, ascending, int64.
        consumer: The layer that takes them.
    """

    kept: Tensor
    consumer: Consumer


def layer_plan(heads: Choice, neurons: Choice) -> LayerPlan:
    """What a block keeps, for the record."""
    return LayerPlan(
        heads=tuple(heads.kept.tolist()),
        neurons=tuple(neurons.kept.tolist()),
        attention_error=heads.consumer.error,
        ffn_error=neurons.consumer.error,
    )


def write_choices(files: WeightFiles, view: LayerView, heads: Choice, neurons: Choice) -> None:
    """Keep the choices of a block."""
    choices = {_HEADS: heads, _NEURONS: neurons}
    tensors: dict[str, Tensor] = {}
    for name, choice in choices.items():
        consumer = choice.consumer
        parts = {"kept": choice.kept, "weight": consumer.weight, "bias": consumer.bias}
        tensors |= {f"{name} {part}": tensor for part, tensor in parts.items() if tensor is not None}
    files.write(view.index, tensors, {name: choice.consumer.error for name, choice in choices.items()})


def read_choices(files: WeightFiles, view: LayerView) -> tuple[Choice, Choice]:
    """Of a finished block, heads first."""
    device: torch.device = view.attention_output.weight.device
    tensors, errors = files.read(view.index, device)
    heads, neurons = (
        Choice(tensors[f"{name} kept"], Consumer(tensors[f"{name} weight"], tensors.get(f"{name} bias"), errors[name]))
        for name in (_HEADS, _NEURONS)
    )
    return heads, neurons
