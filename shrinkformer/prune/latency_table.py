"""How long blocks of different sizes take on this machine."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.architectures.limits import has_position_table, max_positions
from shrinkformer.efficiency.latency import random_batch, time_in_turns
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import BudgetError, InputError
from shrinkformer.prune.budget import CostModel, layer_sizes
from shrinkformer.prune.pruned_modeling import set_block_sizes
from shrinkformer.prune.stream import BlockStream
from shrinkformer.prune.surgery import kept_sizes
from shrinkformer.prune.uniform import uniform_counts

if TYPE_CHECKING:
    from scipy.interpolate import RegularGridInterpolator

_SHARES = (0.02, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_HEAD_SHARES = (0.08, 0.25, 0.5, 0.75, 1.0)
_WIDTH_SHARES = (0.125, 0.5, 1.0)


def require_shape(model: PreTrainedModel, shape: tuple[int, ...]) -> None:
    """Check that a model can be timed on inputs of some shape, examples and tokens.

    Raises:
        InputError: It is empty, or has more tokens than the model has positions.
    """
    shown = f"--latency_shape {shape[0]} {shape[1]}"
    if min(shape) < 1:
        raise InputError(f"{shown}: examples and tokens must be positive.")
    positions = max_positions(model.config)
    if shape[1] > positions and has_position_table(model.config):
        raise InputError(f"{shown}: the model takes {positions} tokens; pass --latency_shape {shape[0]} {positions}.")


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of the two sublayers of a block as functions of their sizes; linear in between.

    The time of a block is that of its attention, to which belongs all that does not depend on sizes, and that of its
    neurons.

    Attributes:
        heads: Measured numbers of heads, ascending.
        query_widths: Measured widths of queries and keys.
        value_widths: Measured widths of values.
        attention: Milliseconds, ``(heads, query widths, value widths)``, never less for more.
        neurons: Measured numbers of neurons.
        feed_forward: Milliseconds that they take, ``(neurons,)``, never less for more.
    """

    heads: tuple[int, ...]
    query_widths: tuple[int, ...]
    value_widths: tuple[int, ...]
    attention: NDArray[np.float64]
    neurons: tuple[int, ...]
    feed_forward: NDArray[np.float64]

    @classmethod
    def measure(
        cls,
        model: PreTrainedModel,
        shape: tuple[int, int],
        *,
        narrow: Sequence[str] = (),
        repeats: int = 9,
        seed: int = 0,
    ) -> "LatencyTable":
        """Time copies of a model's first block; all blocks of a dense model are alike.

        Args:
            model: In evaluation mode, on the device that is meant.
            shape: Examples and tokens of the input.
            narrow: Which of ``query_width`` and ``value_width`` may become less; the others are left as they are.
            repeats: Runs of each size, which take turns; the fastest counts.
            seed: Of the token ids.

        Raises:
            InputError: The shape is empty, or longer than the model.
        """
        require_shape(model, shape)
        view = layer_views(model)[0]
        full = layer_sizes([view])[0]
        widths = {name: _grid(getattr(full, name), _WIDTH_SHARES if name in narrow else (1.0,)) for name in _WIDTHS}
        heads, neurons = _grid(full.heads, _HEAD_SHARES), _grid(full.neurons, _SHARES)
        attention = [
            replace(full, heads=some, head_size=max(query, value), query_width=query, value_width=value)
            for some, query, value in product(heads, widths["query_width"], widths["value_width"])
        ]
        sizes = [*attention, *(replace(full, neurons=some) for some in neurons)]
        generator = torch.Generator().manual_seed(seed)
        batch = random_batch(shape, model.config.vocab_size, generator, model.device)
        times = np.array(_time_blocks(model, view, sizes, batch, repeats))
        feed_forward = np.maximum.accumulate(times[len(attention) :])
        feed_forward = feed_forward - feed_forward[0]
        cube = times[: len(attention)].reshape(len(heads), len(widths["query_width"]), len(widths["value_width"]))
        for axis in range(3):
            cube = np.maximum.accumulate(cube, axis=axis)
        cube = np.maximum(cube - feed_forward[-1], 0.0)
        return cls(heads, widths["query_width"], widths["value_width"], cube, neurons, feed_forward)

    def of_attention(self, size: LayerSize) -> float:
        """Milliseconds of the attention sublayer, and of all that does not depend on sizes."""
        return float(self._attention((size.heads, size.query_width, size.value_width)))

    def of_neurons(self, neurons: int) -> float:
        """Milliseconds that neurons add."""
        return float(np.interp(neurons, self.neurons, self.feed_forward))

    @cached_property
    def _attention(self) -> "RegularGridInterpolator":
        from scipy.interpolate import RegularGridInterpolator

        # An axis with one point has no in between; the doubled point is never left.
        axes = [list(axis) if len(axis) > 1 else [axis[0], axis[0] + 1] for axis in self._axes]
        cube = self.attention
        for number, axis in enumerate(self._axes):
            if len(axis) == 1:
                cube = np.concatenate([cube, cube], axis=number)
        return RegularGridInterpolator(axes, cube, bounds_error=False, fill_value=None)

    @property
    def _axes(self) -> tuple[tuple[int, ...], ...]:
        return self.heads, self.query_widths, self.value_widths


@dataclass(frozen=True, kw_only=True)
class LatencyCosts(CostModel):
    """Time of a model as a function of what it keeps; a budget is a fraction of the time of all blocks.

    Attributes:
        table: Of this machine.
    """

    table: LatencyTable

    @property
    def dense(self) -> float:
        """Milliseconds before pruning."""
        return sum(self.of_attention(layer) + self.of_neurons(layer) for layer in self.layers)

    def of_attention(self, size: LayerSize) -> float:
        """Milliseconds of the attention of a block."""
        return self.table.of_attention(size)

    def of_neurons(self, size: LayerSize) -> float:
        """Milliseconds of the neurons of a block."""
        return self.table.of_neurons(size.neurons)

    def require_feasible(self) -> None:
        """Check that what every block must keep fits the budget.

        Raises:
            BudgetError: It does not.
            InputError: No sizes that all blocks may have alike do.
        """
        budget = self.budget
        if budget.uniform:
            uniform_counts(self)
            return
        least = [
            replace(
                layer,
                heads=min(budget.min_heads, layer.heads),
                neurons=min(-(-budget.min_neurons // budget.round_to) * budget.round_to, layer.neurons),
                query_width=self.table.query_widths[0],
                value_width=self.table.value_widths[0],
            )
            for layer in self.layers
        ]
        share = sum(self.of_attention(layer) + self.of_neurons(layer) for layer in least) / self.dense
        if share > budget.mu:
            raise BudgetError(
                f"--mu {budget.mu} cannot be met: blocks of {budget.min_heads} head(s) and {budget.min_neurons} "
                f"neuron(s) take {share:.2f} of the time on this machine; raise --mu or use --budget macs."
            )


_WIDTHS = ("query_width", "value_width")


def _grid(full: int, shares: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(share * full)) for share in shares}))


def _time_blocks(
    model: PreTrainedModel, view: LayerView, sizes: Sequence[LayerSize], batch: Mapping[str, Tensor], repeats: int
) -> list[float]:
    """Milliseconds of blocks of these sizes, which take turns; the fastest run of each is the least disturbed one."""
    with torch.inference_mode():
        stream = BlockStream(model, [batch])
        blocks = {number: _filled(view, size) for number, size in enumerate(sizes)}
        calls = {number: partial(stream.call, block, 0) for number, block in blocks.items()}
        seconds = time_in_turns(calls, model.device, repeats=repeats)
    return [1000 * min(values) for values in seconds.values()]


def _filled(view: LayerView, size: LayerSize) -> nn.Module:
    """A block of a size with any weights, for its time alone."""
    block = copy.deepcopy(view.block)
    set_block_sizes(block, view.architecture.to_dict(), **kept_sizes(size))
    for parameter in block.parameters():
        parameter.fill_(0.01)  # what was in the memory might be slow to compute with
    return block
