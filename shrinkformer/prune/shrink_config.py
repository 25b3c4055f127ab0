"""Choices of the method ``shrink``."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ShrinkConfig:
    """Choices of the method.

    Attributes:
        whole_heads: Heads keep their width, so that blocks look like those of stock classes.
        search_seconds: Time after which the search for a better plan stops, for each budget; 0 takes the first plan.
            Time that other processes take does not count. A search that is cut short depends on the speed of the
            machine, one that ends by itself does not.
        latency_shape: Examples and tokens of an input. If given, budgets are fractions of the time that all blocks take
            for it on this machine, not of MACs.
        say: Gets a line for every round of the search.
    """

    whole_heads: bool = False
    search_seconds: float = 120.0
    latency_shape: tuple[int, int] | None = None
    say: Callable[[str], None] = lambda _: None
