"""Which block keeps how many heads and neurons, from scores of each and what a unit costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shrinkformer.errors import BudgetError, InputError
from shrinkformer.prune.budget import CostModel, Counts
from shrinkformer.prune.uniform import uniform_counts

Scores = Sequence[NDArray[np.float64]]


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


def require_feasible(costs: CostModel) -> None:
    """Check that what every block must keep fits the budget.

    Raises:
        BudgetError: It does not.
        InputError: ``round_to`` is more than a block has, or blocks that are all alike do not fit.
    """
    allocate_uniformly(costs)


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
        if heads.worst(total) >= units.worst(min(_room(costs, heads, total), units.capacity)):
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
        beside = min(_room(costs, heads, total), units.capacity)
        return heads.worth(total) + costs.budget.round_to * units.worth(beside)

    return _counts(costs, heads, units, max(_feasible_heads(costs, heads, units), key=worth))


def allocate_uniformly(costs: CostModel) -> Counts:
    """The same share of heads and of neurons in every block; the same numbers, where the budget asks for that.

    Raises:
        BudgetError: Even the least that every block must keep costs more than the budget.
        InputError: No numbers that all blocks may have alike fit the budget.
    """
    if costs.budget.uniform:
        share = costs.budget.mu * costs.layers[0].heads
        return min(uniform_counts(costs), key=lambda counts: abs(counts.heads[0] - share))

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
    total_units = min(_room(costs, heads, total_heads), units.capacity)
    return Counts(tuple(heads.cut(total_heads).tolist()), _neurons(costs, units.cut(total_units)))


def _neurons(costs: CostModel, units: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple((units * costs.budget.round_to).tolist())


def _room(costs: CostModel, heads: _Pool, total_heads: int) -> int:
    """Units that fit beside the best heads, so many; may be negative."""
    return costs.affordable_units(heads.cut(total_heads).tolist())


def _feasible_heads(costs: CostModel, heads: _Pool, units: _Pool) -> list[int]:
    """Numbers of heads that leave room for enough neurons."""
    cheapest = costs.macs(Counts(tuple(heads.minimum.tolist()), _neurons(costs, units.minimum)))
    candidates = [
        count for count in range(heads.least, heads.capacity + 1) if _room(costs, heads, count) >= units.least
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
    spending = [count for count in candidates if _room(costs, heads, count) <= units.capacity]
    candidates = spending or candidates[-1:]
    return [count for count in candidates if count >= fewest] or candidates[-1:]
