"""How far something is: a bar with the time left on a terminal, whole lines where output goes to a file or a pipe."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_TENTHS = 10
_SECONDS = 1.0
"""Between two lines, but for the last one: a stage that takes a moment is worth one line."""


class Bar(Protocol):
    """What is told how far something is, as tqdm's bars are."""

    def update(self, n: int, /) -> object:
        """Take up that ``n`` more are done."""


@contextmanager
def counted(total: int, what: str, unit: str, *, shown: bool = True) -> Iterator[Bar]:
    """Show how many of something are done.

    Args:
        total: How many there are.
        what: What is done.
        unit: What is counted, one of them.
        shown: Whether anything is shown.

    Yields:
        Is told how many more are done.
    """
    if not shown or sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=unit, disable=not shown) as bar:
            yield bar
    else:
        yield _Lines(total, what, unit)


def each(items: Collection[Item], what: str, unit: str) -> Iterator[Item]:
    """The items, one after the other, showing how many are done."""
    with counted(len(items), what, unit) as bar:
        for item in items:
            yield item
            bar.update(1)


class _Lines:
    """One line for every tenth, or for each of fewer, on standard output, where messages go."""

    def __init__(self, total: int, what: str, unit: str) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._done = self._told = 0
        self._began = self._last = perf_counter()

    def update(self, n: int, /) -> None:
        self._done += n
        now, tenth = perf_counter(), self._done * _TENTHS // max(1, self._total)
        over = self._done >= self._total
        if tenth == self._told or (not over and now - self._last < _SECONDS):
            return
        self._told, self._last = tenth, now
        spent = now - self._began
        left = spent / self._done * (self._total - self._done)
        time = f"in {_clock(spent)}" if over else f"{_clock(spent)} so far, about {_clock(left)} left"
        units = self._unit if self._total == 1 else f"{self._unit}s"
        print(f"  {self._what}: {self._done:,} of {self._total:,} {units} {time}", flush=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(7.6), _clock(3700)
    ('0:08', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
