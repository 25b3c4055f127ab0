"""How many threads a process may really use, and how they wait for each other. Nothing here imports torch by itself."""

import math
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/")
_OWN_CHOICE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait for each other sleep instead of spinning, unless the user chose how; before torch loads.

    A thread that spins on a core takes it from the one it waits for, once other processes are there, too. torch's
    OpenMP (libgomp, and Intel's) reads ``OMP_WAIT_POLICY`` when it is loaded.

    Args:
        environment: Is changed. Processes started from here inherit it.
    """
    if not any(name in environment for name in _OWN_CHOICE):
        environment["OMP_WAIT_POLICY"] = "passive"


def usable_threads(root: Path = _ROOT, environment: Mapping[str, str] = os.environ) -> int:
    """Cores that this process may use at once, at least 1.

    The least of those it may run on and of what a container allows, shared among the processes that torchrun started
    on this machine. ``OMP_NUM_THREADS``, which torchrun sets as well, says otherwise.

    Args:
        root: Where ``proc`` and ``sys`` are.
        environment: Variables.
    """
    wanted = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    # Python 3.13 has os.process_cpu_count; macOS knows no affinity
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    together = environment.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(together) if together.isdecimal() else 1))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that control groups allow this process, the least of its group and those above; or None.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``) and
        https://docs.kernel.org/scheduler/sched-bwc.html (``cpu.cfs_quota_us``).
    """
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            mount, limit = root / "sys/fs/cgroup", _limit_v2
        elif "cpu" in controllers.split(","):
            mount, limit = root / "sys/fs/cgroup/cpu", _limit_v1
        else:
            continue
        # In a container the mount begins at its own group, whose path is the host's: then only the mount is there.
        parts = [part for part in group.split("/") if part not in {"", "..", "."}]
        folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
        found += [value for folder in folders if (value := limit(folder)) is not None]
    return min(found, default=None)


def _limit_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return _ratio(quota, period or "100000")


def _limit_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    """None for ``max``, -1, and whatever is no number."""
    whole = quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0
    return int(quota) / int(period) if whole else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


@contextmanager
def threads_of(count: int | None = None) -> Iterator[int]:
    """So many threads for torch and for the BLAS of numpy; their number. Afterwards as before.

    Args:
        count: None leaves torch's choice where it is no more than the process may use.
    """
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    chosen = count or min(before, usable_threads())
    torch.set_num_threads(chosen)
    try:
        with threadpool_limits(limits=chosen, user_api="blas"):
            yield chosen
    finally:
        torch.set_num_threads(before)
