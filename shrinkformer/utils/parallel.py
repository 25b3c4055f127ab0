"""Processes that share one job, as ``torchrun`` starts them; without torchrun one process has it all.

Work is dealt out like cards: process ``rank`` of ``size`` takes the items ``rank``, ``rank + size``, ... Every method
is called by all processes in the same order, and does nothing, or hands back what it got, when there is only one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shrinkformer.errors import InputError

T = TypeVar("T")

_NOTHING: Any = object()
_TIMEOUT = timedelta(hours=1)  # the others wait while the first process computes something alone


@dataclass(frozen=True)
class Workers:
    """The processes of a job, seen from one of them.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this process has to do."""
        return list(items[self.rank :: self.size])

    def share_rows(self, rows: Tensor) -> Tensor:
        """The rows of a tensor ``(rows, ...)`` that this process has to do; a view."""
        return rows[self.rank :: self.size]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, for every process, in the order they had before :meth:`share`.

        Args:
            items: One result for each item of this process's share; they travel pickled, so tensors should be on the
                CPU.
        """
        if self.size == 1:
            return list(items)
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(items))
        rounds = zip_longest(*parts, fillvalue=_NOTHING)
        return [item for one_round in rounds for item in one_round if item is not _NOTHING]

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each contiguous tensor by its sum over all processes, in its own type, on its own device."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, op=dist.ReduceOp.SUM)

    def broadcast(self, value: T) -> T:
        """What the main process passed; it travels pickled, and what the other processes passed is ignored."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            # An object on the CPU: NCCL's own barrier would need, and guess, a GPU.
            self.gather([None])


ALONE = Workers()


def local_device(device: str) -> str:
    """The device of this process: ``cuda`` is the GPU that bears its local number, all else is itself.

    Source: https://docs.pytorch.org/docs/stable/elastic/run.html (``LOCAL_RANK``).
    """
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def start_workers(device: str) -> Workers:
    """Join the processes that torchrun started; :data:`ALONE` when it started one, or was not used.

    Args:
        device: Where tensors live, ``cpu`` or ``cuda``. CPU tensors and objects travel by gloo, CUDA tensors by NCCL.

    Raises:
        InputError: Several processes would share one GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    chosen = torch.device(local_device(device))
    if chosen.type == "cuda":
        _take_gpu(chosen, device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    return Workers(dist.get_rank(), dist.get_world_size())


def _take_gpu(chosen: torch.device, asked: str) -> None:
    """Make a GPU the current one, without which NCCL would put every process on the first."""
    found = torch.cuda.device_count()
    if asked != "cuda":
        raise InputError(f"--device {asked} would serve several processes; pass --device cuda: each takes its own GPU.")
    if chosen.index >= found:
        raise InputError(
            f"torchrun started more processes than there are GPUs ({found}); pass it --nproc_per_node {found}."
        )
    torch.cuda.set_device(chosen)


def stop_workers() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def workers_of(device: str) -> Iterator[Workers]:
    """Join the processes that torchrun started and leave them at the end, also after an error."""
    workers = start_workers(device)
    try:
        yield workers
    finally:
        if workers.size > 1:
            stop_workers()
