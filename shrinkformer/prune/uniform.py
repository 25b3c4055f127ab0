"""One number of heads and one of neurons for all blocks under a budget."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shrinkformer.errors import InputError
from shrinkformer.prune.budget import CostModel, Counts
from shrinkformer.prune.stock import UNIFORM

Tails = Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class Losses:
    """What is lost in every block, of anything that adds up.

    Attributes:
        heads: For each block, at ``k`` the loss when its best ``k`` heads are kept, ``(heads + 1,)``.
        neurons: The same for neurons.
    """

    heads: Tails
    neurons: Tails

    @classmethod
    def relative(cls, heads: Tails, neurons: Tails) -> Self:
        """Squares of errors, each relative to the sublayer's own output: 1 where nothing of it is left."""

        def squares(errors: NDArray[np.float64]) -> NDArray[np.float64]:
            shares: NDArray[np.float64] = np.square(errors / max(float(errors[0]), np.finfo(np.float64).tiny))
            return shares

        return cls([squares(tails) for tails in heads], [squares(tails) for tails in neurons])

    def of(self, counts: Counts) -> float:
        """The sum over all blocks."""
        parts = ((self.heads, counts.heads), (self.neurons, counts.neurons))
        return sum(float(tails[kept]) for losses, numbers in parts for tails, kept in zip(losses, numbers, strict=True))


def uniform_counts(costs: CostModel) -> list[Counts]:
    """For every number of heads that blocks may have alike the largest number of neurons beside it.

    A number of heads at which another one allows as many neurons, and more heads, is left out.

    Args:
        costs: What sizes cost, the budget, and the numbers of heads to choose from.

    Returns:
        At least one, fewest heads first.

    Raises:
        InputError: Even the least that every block must keep costs more than the budget, or ``round_to`` is more than
            a block has.
    """
    budget, blocks = costs.budget, len(costs.layers)
    narrowest = min(layer.neurons for layer in costs.layers)
    if budget.round_to > narrowest:
        raise InputError(f"--round_to {budget.round_to}: a block has only {narrowest} neurons; use a smaller number.")
    fewest_heads = min(budget.min_heads, costs.head_counts[-1])
    candidates = [heads for heads in costs.head_counts if heads >= fewest_heads]
    least = min(-(-budget.min_neurons // budget.round_to), narrowest // budget.round_to) * budget.round_to
    found: list[Counts] = []
    for heads in reversed(candidates):
        neurons = _most_neurons(costs, heads, narrowest)
        if neurons >= least and (not found or neurons > found[-1].neurons[0]):
            found.append(Counts((heads,) * blocks, (neurons,) * blocks))
    if not found:
        cheapest = min(_of_heads(costs, heads) for heads in candidates) + _of_neurons(costs, least)
        raise InputError(_infeasible(costs, candidates, least, cheapest / costs.dense))
    return found[::-1]


def allocate_alike(costs: CostModel, losses: Losses) -> Counts:
    """The same number of heads and of neurons for all blocks, at the least loss in all.

    Raises:
        InputError: No such numbers fit the budget.
    """
    return min(uniform_counts(costs), key=losses.of)


def _most_neurons(costs: CostModel, heads: int, narrowest: int) -> int:
    """Negative where not even the heads fit."""
    step, room = costs.budget.round_to, costs.allowance - _of_heads(costs, heads)
    units = range(narrowest // step + 1)
    return step * (bisect_right(units, room, key=lambda count: _of_neurons(costs, count * step)) - 1)


def _of_heads(costs: CostModel, heads: int) -> float:
    return sum(costs.of_attention(replace(layer, heads=heads)) for layer in costs.layers)


def _of_neurons(costs: CostModel, neurons: int) -> float:
    return sum(costs.of_neurons(replace(layer, neurons=neurons)) for layer in costs.layers)


def _infeasible(costs: CostModel, candidates: Sequence[int], least: int, share: float) -> str:
    only = len(candidates) == 1 and candidates[0] == min(layer.heads for layer in costs.layers)
    kept = f"all {candidates[0]} heads" if only else f"at least {candidates[0]} head(s)"
    smallest = (floor(share * 1e4 + 1e-6) + 1) / 1e4  # rounded up, and not quite what the least costs
    return (
        f"--mu {costs.budget.mu} cannot be met with {UNIFORM}: every block keeps {kept} and at least {least} "
        f"neuron(s); the smallest --mu that can is {smallest:.4f}. Raise --mu or leave {UNIFORM} out."
    )
