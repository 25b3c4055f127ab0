"""How many heads and neurons each block keeps under a MAC budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shrinkformer.architectures import LayerView
from shrinkformer.efficiency.macs import LayerSize, attention_macs, model_macs, neuron_macs
from shrinkformer.errors import BudgetError, InputError

Scores = Sequence[NDArray[np.float64]]

_SLACK = 1e-12
"""Relative distance kept from the budget, so that rounding in a sum of MACs cannot carry the result above it."""


@dataclass(frozen=True)
class Budget:
    """What a pruned model may cost.

    Attributes:
        mu: Fraction of the MACs that may stay, in (0, 1].
        sequence_length: Length in tokens at which MACs are counted; a mean, so any positive number.
        round_to: Number of neurons of a block is a multiple of this, where that makes matrix products faster.
        min_heads: Heads that every block keeps at least.
        min_neurons: Neurons that every block keeps at least.

    Raises:
        InputError: A value is out of its range.
    """

    mu: float
    sequence_length: float
    round_to: int = 1
    min_heads: int = 1
    min_neurons: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.mu <= 1:
            raise InputError(f"--mu {self.mu}: must be in (0, 1]; it is the fraction of MACs that stays.")
        if not self.sequence_length > 0:
            raise InputError(f"--sequence_length {self.sequence_length}: must be positive.")
        for name in ("round_to", "min_heads", "min_neurons"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1.")


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
    """

    layers: tuple[LayerSize, ...]
    hidden_size: int
    budget: Budget
    pre_norm: bool = False

    @classmethod
    def of(cls, views: Sequence[LayerView], budget: Budget) -> "CostModel":
        """The cost model of a model's blocks."""
        return cls(layer_sizes(views), views[0].hidden_size, budget, views[0].architecture.pre_norm)

    @property
    def dense(self) -> float:
        """MACs before pruning."""
        return model_macs(self.layers, self.hidden_size, self.budget.sequence_length)

    @property
    def head(self) -> float:
        """MACs of one head."""
        return attention_macs(self.budget.sequence_length, self.hidden_size, replace(self.layers[0], heads=1))

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

    def require_feasible(self) -> None:
        """Check that what every block must keep fits the budget.

        Raises:
            BudgetError: It does not.
            InputError: ``round_to`` is more than a block has.
        """
        allocate_uniformly(self)

    def affordable_units(self, heads: int) -> int:
        """How many groups of ``round_to`` neurons, over all blocks, fit beside a number of heads; may be negative."""
        allowance = self.budget.mu * self.dense * (1 - _SLACK if self.budget.mu < 1 else 1 + _SLACK)
        return int(np.floor((allowance - heads * self.head) / (self.neuron * self.budget.round_to)))


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


@dataclass(frozen=True)
class _Pool:
    """Units of all blocks in one order of preference; each block's own order is kept."""

    owner: NDArray[np.int64]  # block of every unit beyond the minimum, best first
    values: NDArray[np.float64]  # its score
    minimum: NDArray[np.int64]  # units that each block keeps in any case
    capacity: int  # units in all

    @classmethod
    def build(cls, scores: Scores, minimum: int) -> "_Pool":
        floor = np.array([min(minimum, len(score)) for score in scores])
        rest = [np.minimum.accumulate(score)[kept:] for score, kept in zip(scores, floor, strict=True)]
        owner = np.repeat(np.arange(len(scores)), [len(part) for part in rest])
        values = np.concatenate(rest)
        order = np.argsort(-values, kind="stable")
        return cls(owner[order], values[order], floor, int(floor.sum() + len(values)))

    @property
    def least(self) -> int:
        return int(self.minimum.sum())

    def worth(self, total: int) -> float:
        """Sum of the squared scores of the best ``total``, beyond the minimum."""
        return float(np.square(self.values[: total - self.least]).sum())

    def cut(self, total: int) -> NDArray[np.int64]:
        """Units per block when the best ``total`` of all blocks are kept."""
        chosen = self.owner[: total - self.least]
        return self.minimum + np.bincount(chosen, minlength=len(self.minimum))

    def threshold(self, total: int) -> float:
        """Score of the worst unit kept; 0 when nothing is removed."""
        return 0.0 if total >= self.capacity else self.worst(max(total, self.least + 1))

    def worst(self, total: int) -> float:
        """Score of the worst unit kept beyond the minimum; infinite where there is none."""
        return float(self.values[total - self.least - 1]) if total > self.least else float("inf")


def allocate_globally(
    costs: CostModel, head_scores: Scores, neuron_scores: Scores, neuron_tails: Scores, trade: float
) -> Counts:
    """One threshold over the heads of all blocks, one over the neurons, and a trade between the two.

    The number of heads is the one at which the error of the worst head kept is nearest to ``trade`` times the mean
    error of the neurons removed; neurons fill what the heads leave of the budget, exactly.

    Args:
        costs: MACs of heads and neurons, and the budget.
        head_scores: For each block, the scores of its heads, best first.
        neuron_scores: For each block, the scores of its neurons, best first.
        neuron_tails: For each block, at ``k`` the error when its best ``k`` neurons are kept.
        trade: How many times the error of removed neurons a head may cost.

    Raises:
        BudgetError: Even the least that every block must keep costs more than the budget.

    Source:
        STAT (arXiv 2406.00061) chooses the number of heads in this way; its code counts whole heads per block on
        average and uses one fixed MAC share, while here every number of heads is tried at its real cost.
    """
    heads, units = _pools(costs, head_scores, neuron_scores)
    # As published: not fewer heads, on average, than the budget's share rounded down.
    fewest = max(heads.least, sum(int(costs.budget.mu * layer.heads) for layer in costs.layers))
    best: tuple[float, Counts] | None = None
    for total_heads in _affordable_heads(costs, heads, units, fewest):
        counts = _counts(costs, heads, units, total_heads)
        tail = np.mean([tails[kept] for tails, kept in zip(neuron_tails, counts.neurons, strict=True)])
        gap = abs(heads.threshold(total_heads) - trade * float(tail))
        if best is None or gap < best[0]:
            best = gap, counts
    assert best is not None  # _affordable_heads raises rather than yield nothing
    return best[1]


def allocate_at_threshold(costs: CostModel, head_scores: Scores, neuron_scores: Scores) -> Counts:
    """One threshold over the heads and neurons of all blocks alike.

    Args:
        costs: MACs of heads and neurons, and the budget.
        head_scores: For each block, the scores of its heads, best first; not negative. A block may have fewer than it
            was built with.
        neuron_scores: The same of its neurons.

    Raises:
        BudgetError: Even the least that every block must keep costs more than the budget.
    """
    heads, units = _pools(costs, head_scores, neuron_scores)
    candidates = _affordable_heads(costs, heads, units, heads.least)
    chosen = candidates[0]
    for total in candidates:  # the more heads, the worse the last of them, and the better the last neuron
        if heads.worst(total) >= units.worst(min(costs.affordable_units(total), units.capacity)):
            chosen = total
    return _counts(costs, heads, units, chosen)


def allocate_for_most(costs: CostModel, head_scores: Scores, neuron_scores: Scores) -> Counts:
    """The heads and neurons whose squared scores add up to most, exactly: every number of heads is tried.

    Arguments and errors are those of :func:`allocate_at_threshold`.

    Source:
        Kwon et al., arXiv 2204.09656, section 4.1, with the least that every block keeps, and never above the budget.
    """
    heads, units = _pools(costs, head_scores, neuron_scores)

    def worth(total: int) -> float:
        beside = min(costs.affordable_units(total), units.capacity)
        return heads.worth(total) + costs.budget.round_to * units.worth(beside)

    return _counts(costs, heads, units, max(_feasible_heads(costs, heads, units), key=worth))


def allocate_uniformly(costs: CostModel) -> Counts:
    """The same share of heads and of neurons in every block.

    Raises:
        BudgetError: Even the least that every block must keep costs more than the budget.
    """

    def even(size: int) -> NDArray[np.float64]:
        return 1.0 - np.arange(size) / size

    heads, units = _pools(
        costs, [even(layer.heads) for layer in costs.layers], [even(layer.neurons) for layer in costs.layers]
    )
    wanted = round(costs.budget.mu * heads.capacity)
    total_heads = min(_affordable_heads(costs, heads, units, heads.least), key=lambda count: abs(count - wanted))
    return _counts(costs, heads, units, total_heads)


def _pools(costs: CostModel, head_scores: Scores, neuron_scores: Scores) -> tuple[_Pool, _Pool]:
    budget = costs.budget
    narrowest = min(layer.neurons for layer in costs.layers)
    if budget.round_to > narrowest:
        raise InputError(f"--round_to {budget.round_to}: a block has only {narrowest} neurons; use a smaller number.")
    units = [_unit_scores(scores, budget.round_to) for scores in neuron_scores]
    least_units = -(-budget.min_neurons // budget.round_to)
    return _Pool.build(head_scores, budget.min_heads), _Pool.build(units, least_units)


def _unit_scores(scores: NDArray[np.float64], round_to: int) -> NDArray[np.float64]:
    whole = len(scores) // round_to * round_to
    squares: NDArray[np.float64] = np.square(scores[:whole]).reshape(-1, round_to).mean(axis=1)
    return np.sqrt(squares)


def _counts(costs: CostModel, heads: _Pool, units: _Pool, total_heads: int) -> Counts:
    """The best heads, so many, and the best neurons that fit beside them."""
    total_units = min(costs.affordable_units(total_heads), units.capacity)
    return Counts(tuple(heads.cut(total_heads).tolist()), _neurons(costs, units.cut(total_units)))


def _neurons(costs: CostModel, units: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple((units * costs.budget.round_to).tolist())


def _feasible_heads(costs: CostModel, heads: _Pool, units: _Pool) -> list[int]:
    """Numbers of heads that leave room for enough neurons."""
    cheapest = costs.macs(Counts(tuple(heads.minimum.tolist()), _neurons(costs, units.minimum)))
    candidates = [
        count for count in range(heads.least, heads.capacity + 1) if costs.affordable_units(count) >= units.least
    ]
    if not candidates:
        raise BudgetError(
            f"--mu {costs.budget.mu} cannot be met: one block must keep at least {costs.budget.min_heads} head(s) and "
            f"{_neurons(costs, units.minimum)[0]} neuron(s), which takes mu {cheapest / costs.dense:.4f}; "
            "raise --mu or lower --min_heads, --min_neurons or --round_to."
        )
    return candidates


def _affordable_heads(costs: CostModel, heads: _Pool, units: _Pool, fewest: int) -> list[int]:
    """Of these, numbers of heads that leave nothing unspent while heads are to be had."""
    candidates = _feasible_heads(costs, heads, units)
    spending = [count for count in candidates if costs.affordable_units(count) <= units.capacity]
    candidates = spending or candidates[-1:]
    return [count for count in candidates if count >= fewest] or candidates[-1:]
