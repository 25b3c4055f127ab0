"""What pruning gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from transformers import PreTrainedModel

from shrinkformer.prune.plan import Plan


@dataclass(frozen=True)
class Pruned:
    """A smaller model, what it keeps, and how long each step took in seconds."""

    model: PreTrainedModel
    plan: Plan
    seconds: dict[str, float]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that a block of code takes to ``seconds[name]``."""
    start = perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + perf_counter() - start
