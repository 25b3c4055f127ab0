"""The multiple-choice knapsack: one option of each group, least damage in all, costs within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from shrinkformer.errors import BudgetError

T = TypeVar("T")


@dataclass(frozen=True)
class Option(Generic[T]):
    """One choice for a group.

    Attributes:
        cost: What it takes of the budget.
        damage: What it does; sums of these are minimised.
        value: What it stands for.
    """

    cost: float
    damage: float
    value: T


def frontier(options: Sequence[Option[T]]) -> list[Option[T]]:
    """The options than which no other is both cheaper and better, cheapest first."""
    kept: list[Option[T]] = []
    for option in sorted(options, key=lambda one: (one.cost, one.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept


def wary(groups: Sequence[Sequence[Option[T]]], toll: float) -> list[list[Option[T]]]:
    """The same groups, where every option but the first, which is no change, does so much more damage."""
    return [
        [Option(one.cost, one.damage + (toll if number else 0.0), one.value) for number, one in enumerate(group)]
        for group in groups
    ]


def choose(groups: Sequence[Sequence[Option[T]]], budget: float, *, bins: int = 20_000) -> tuple[list[T], float]:
    """Choose one option of each group by dynamic programming over a grid of costs.

    Args:
        groups: Options of each group.
        budget: Costs of the chosen options never sum to more.
        bins: Points of the grid; each cost is rounded up to the next, so at most ``groups / bins`` of the budget is
            left unused.

    Returns:
        The value chosen in each group, and the sum of damages.

    Raises:
        BudgetError: The cheapest options cost more than the budget.

    Source:
        Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, section 11.5.
    """
    unit = budget / bins
    best = np.zeros(bins + 1)
    choices: list[np.ndarray] = []
    for options in groups:
        after, choice = np.full(bins + 1, np.inf), np.full(bins + 1, -1)
        for number, option in enumerate(options):
            steps = int(np.ceil(option.cost / unit - 1e-9))
            if steps > bins:
                continue
            reached = best[: bins + 1 - steps] + option.damage
            better = reached < after[steps:]
            after[steps:][better] = reached[better]
            choice[steps:][better] = number
        best = after
        choices.append(choice)
    if not np.isfinite(best[bins]):
        least = sum(min(option.cost for option in options) for options in groups)
        raise BudgetError(f"the least that every sublayer can keep costs {least / budget:.3f} of the budget; raise mu.")
    place, values = bins, []
    for options, choice in zip(reversed(groups), reversed(choices), strict=True):
        chosen = options[int(choice[place])]
        values.append(chosen.value)
        place -= int(np.ceil(chosen.cost / unit - 1e-9))
    return values[::-1], float(best[bins])
