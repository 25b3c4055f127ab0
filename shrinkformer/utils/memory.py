"""What to do when memory runs out: go on with half as many examples at a time."""

import errno
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from shrinkformer.errors import OutOfMemoryError, warn

T = TypeVar("T")
Batch = Mapping[str, Tensor]

_SIGNS = (
    "can't allocate memory",  # torch on CPUs
    "not enough memory",  # torch on CPUs, on Windows
    "out of memory",  # CUDA and MPS, where the error is no torch.OutOfMemoryError
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory",  # oneDNN
    "bad_alloc",
)

REMEDIES = "pass a smaller --batch_size or --sequence_length, or --max_memory where a model may pass block by block"
"""What users of the commands can do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes do not fit"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def with_smaller_batches(step: Callable[[int], T], most: int, *, what: str) -> T:
    """Take a step again with half as many examples at a time, as often as memory runs out.

    Args:
        step: Gets the most examples that it may take at a time. Called anew, it must not build on what it left behind.
        most: What it gets at first.
        what: The step, for messages.

    Raises:
        OutOfMemoryError: One example at a time is still too much.

    Warns:
        ShrinkformerWarning: Of each new size.
    """
    while True:
        try:
            return step(most)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if most <= 1:
                raise _hopeless(what, error) from None
        # Here, not in the clause above: the error holds the frames it went through, with all of their tensors.
        most = _half(most, what)


class Halving:
    """Calls something on batches, of which each is cut in two as often as memory runs out.

    Examples and padding stay as they are. What was too much once is not tried again.

    Args:
        what: What is done with them, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._most: int | None = None

    def __call__(self, call: Callable[[Batch], T], batch: Batch) -> Iterator[tuple[slice, T]]:
        """The rows of the batch that a call took, and what it gave, in order.

        Raises:
            OutOfMemoryError: One example at a time is still too much.
        """
        count, start = _examples(batch), 0
        while start < count:
            most = min(count, self._most or count)
            rows = slice(start, min(start + most, count))
            try:
                found = call(batch if most == count else {name: value[rows] for name, value in batch.items()})
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if most <= 1:
                    raise _hopeless(self._what, error) from None
            else:
                yield rows, found
                start = rows.stop
                continue
            self._most = _half(most, self._what)


def free_memory() -> None:
    """Give back what nothing refers to any more, also what an accelerator's allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest(batches: Sequence[Batch]) -> int:
    """Examples of the largest batch, at least 1."""
    return max([1, *(_examples(batch) for batch in batches)])


def limited(batches: Sequence[Batch], most: int) -> Sequence[Batch]:
    """The same examples, padding and all, in the same order, at most so many in a batch.

    Where no batch is larger, this is ``batches`` itself.
    """
    if largest(batches) <= most:
        return batches
    parts = list[Batch]()
    for batch in batches:
        rows = [slice(start, start + most) for start in range(0, _examples(batch), most)]
        parts += [{name: value[some] for name, value in batch.items()} for some in rows] if len(rows) > 1 else [batch]
    return parts


def _examples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _half(most: int, what: str) -> int:
    half = (most + 1) // 2
    free_memory()
    warn(f"{what}: out of memory with {most} examples at a time; going on with {half}")
    return half


def _hopeless(what: str, error: Exception) -> OutOfMemoryError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return OutOfMemoryError(f"{what}: out of memory even with one example at a time ({lines[0][:200]}); {REMEDIES}.")
