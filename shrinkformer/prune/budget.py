"""How many heads and neurons each block keeps under a MAC budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shrinkformer.architectures import LayerView
from shrinkformer.efficiency.macs import LayerSize, attention_macs, model_macs, neuron_macs
from shrinkformer.prune.limits import Budget
from shrinkformer.prune.stock import stock_head_counts

__all__ = ["Budget", "CostModel", "Counts", "layer_sizes"]

_SLACK = 1e-12
"""Relative distance kept from the budget, so that rounding in a sum of MACs cannot carry the result above it."""


@dataclass(frozen=True)
class Counts:
    """Heads and neurons that each block keeps."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


@dataclass(frozen=True)
class CostModel:
    """MACs of a model as a function of what it keeps.

    Attributes:
        layers: Sizes before pruning.
        hidden_size: Width of the residual stream.
        budget: What may stay.
        pre_norm: Whether outputs of blocks grow with depth, see the architecture record.
        head_counts: Where the budget asks for blocks that are all alike, the numbers of heads that they may have,
            ascending; otherwise none.
    """

    layers: tuple[LayerSize, ...]
    hidden_size: int
    budget: Budget
    pre_norm: bool = False
    head_counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, views: Sequence[LayerView], budget: Budget) -> "CostModel":
        """The cost model of a model's blocks.

        Raises:
            InputError: Blocks shall be all alike, and were pruned before in a way that no stock configuration can say.
        """
        sizes, first = layer_sizes(views), views[0]
        counts = stock_head_counts(first.architecture, sizes, first.config) if budget.uniform else ()
        return cls(sizes, first.hidden_size, budget, first.pre_norm, counts)

    @property
    def dense(self) -> float:
        """MACs before pruning."""
        return model_macs(self.layers, self.hidden_size, self.budget.sequence_length)

    @property
    def allowance(self) -> float:
        """What may stay, with room for rounding in a sum."""
        return self.budget.mu * self.dense * (1 - _SLACK if self.budget.mu < 1 else 1 + _SLACK)

    def head(self, index: int) -> float:
        """MACs of one head of a block; heads of a model that was pruned before may differ in width."""
        return attention_macs(self.budget.sequence_length, self.hidden_size, replace(self.layers[index], heads=1))

    @property
    def neuron(self) -> float:
        """MACs of one neuron."""
        return neuron_macs(self.budget.sequence_length, self.hidden_size, self.layers[0].gated)

    def of_attention(self, size: LayerSize) -> float:
        """MACs of the attention of a block."""
        return attention_macs(self.budget.sequence_length, self.hidden_size, size)

    def of_neurons(self, size: LayerSize) -> float:
        """MACs of the neurons of a block."""
        return size.neurons * neuron_macs(self.budget.sequence_length, self.hidden_size, size.gated)

    def macs(self, counts: Counts) -> float:
        """MACs of what is kept."""
        return model_macs(self.sizes(counts), self.hidden_size, self.budget.sequence_length)

    def sizes(self, counts: Counts) -> list[LayerSize]:
        """Sizes of the blocks when so much is kept."""
        return [
            replace(layer, heads=heads, neurons=neurons)
            for heads, neurons, layer in zip(counts.heads, counts.neurons, self.layers, strict=True)
        ]

    def affordable_units(self, heads: Sequence[int]) -> int:
        """How many groups of ``round_to`` neurons, over all blocks, fit beside each block's heads; may be negative."""
        taken = sum(count * self.head(index) for index, count in enumerate(heads))
        return int(np.floor((self.allowance - taken) / (self.neuron * self.budget.round_to)))


def layer_sizes(views: Sequence[LayerView]) -> tuple[LayerSize, ...]:
    """Sizes of a model's blocks, read from its weights."""
    return tuple(
        LayerSize(
            view.heads,
            view.head_size,
            view.neurons,
            view.architecture.feed_forward.gated,
            view.queries,
            view.query_width,
            view.value_width,
        )
        for view in views
    )
