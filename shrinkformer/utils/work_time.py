"""Limits in seconds that do not depend on what other processes take."""

import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

_NOTEWORTHY = 0.1
"""Of the time that was worked: what others took of less is not said."""


def waited_seconds() -> float:
    """Seconds for which this thread was ready to run and had no core, since it began; 0 where the system does not say.

    Linux counts it (``schedstat``: time on a run queue), a container's quota included, a virtual machine's stolen time
    not. Other threads of this process may have waited longer.

    Source: https://docs.kernel.org/scheduler/sched-stats.html
    """
    try:
        words = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text(encoding="ascii").split()
        return int(words[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def work_seconds() -> float:
    """A clock that stands still while this thread waits for a core; only differences mean something."""
    return perf_counter() - waited_seconds()


class Allowance:
    """So many seconds of work, beginning now.

    Args:
        seconds: How many.
        spared: Seconds of work that were taken up from an earlier run so far; what is taken up from now on counts.
    """

    def __init__(self, seconds: float, spared: Callable[[], float] = lambda: 0.0) -> None:
        self._seconds, self._spared = seconds, spared
        self._work, self._wall = work_seconds() + spared(), perf_counter() + spared()

    def is_used(self) -> bool:
        """Whether they are over."""
        return self.worked >= self._seconds

    @property
    def worked(self) -> float:
        """Seconds of work so far."""
        return work_seconds() + self._spared() - self._work

    def cut_short(self) -> str:
        """What a search says that ended because its seconds were over."""
        return f"search cut short after {self}; a longer --search_seconds would go on"

    def __str__(self) -> str:
        """How long it really took: ``30 s of work, while other processes had the processor for 45 s more``."""
        waited = perf_counter() + self._spared() - self._wall - self.worked
        if waited < _NOTEWORTHY * max(self.worked, 1.0):
            return f"{self.worked:.0f} s"
        return f"{self.worked:.0f} s of work, while other processes had the processor for {waited:.0f} s more"
