"""Calibration examples on their way through a model, one block at a time.

The blocks themselves do the computing: the arguments of the first block are recorded with a forward pre-hook, then
every block is called with what it got there, so no forward pass is written a second time and no argument is lost.
Only the hidden states of all examples and one block's working set are in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.utils.inputs import accepted_inputs

Observer = Callable[[Tensor], None]

_BUFFERED_ROWS = 4096


class _FirstBlockReached(Exception):  # noqa: N818
    """Ends a forward pass whose remaining blocks nobody needs."""


@dataclass
class _MicroBatch:
    hidden: Tensor  # (examples, length, hidden size)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor  # (examples, length), True where there is a token


class _RowBuffer:
    """Hands rows on a few thousand at a time: one large matrix product is cheaper than many small ones."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._rows: list[Tensor] = []
        self._count = 0

    def __call__(self, rows: Tensor) -> None:
        self._rows.append(rows)
        self._count += len(rows)
        if self._count >= _BUFFERED_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._observer(torch.cat(self._rows))
        self._rows, self._count = [], 0


class BlockStream:
    """The hidden states of all calibration examples at the entrance of one block.

    Args:
        model: A model in evaluation mode.
        first_block: The first of its transformer blocks.
        batches: Model inputs with an ``attention_mask``; padding never reaches an observer.
    """

    def __init__(self, model: PreTrainedModel, first_block: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self._batches = [_record(model, first_block, accepted_inputs(model.base_model, batch)) for batch in batches]

    @property
    def tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return sum(int(batch.mask.sum()) for batch in self._batches)

    @torch.no_grad()
    def run(self, block: nn.Module, observers: Mapping[nn.Module, Observer] | None = None) -> None:
        """Send all examples through a block.

        Args:
            block: The next block.
            observers: For a layer inside the block, a function that gets the rows of its input, ``(tokens, features)``.
        """
        buffers = {module: _RowBuffer(observer) for module, observer in (observers or {}).items()}
        for batch in self._batches:
            with _observed(buffers, batch.mask):
                output = block(batch.hidden, *batch.args, **batch.kwargs)
            batch.hidden = output[0] if isinstance(output, tuple) else output
        for buffer in buffers.values():
            buffer.flush()


@torch.no_grad()
def _record(model: PreTrainedModel, first_block: nn.Module, batch: dict[str, Tensor]) -> _MicroBatch:
    recorded: list[_MicroBatch] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        recorded.append(_MicroBatch(hidden, tuple(rest), kwargs, batch["attention_mask"].bool()))
        raise _FirstBlockReached

    handle = first_block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model.base_model(**batch)
    except _FirstBlockReached:
        pass
    finally:
        handle.remove()
    return recorded[0]


@contextmanager
def _observed(observers: Mapping[nn.Module, Observer], mask: Tensor) -> Iterator[None]:
    def hook_for(observer: Observer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            observer(args[0][mask])

        return hook

    handles = [module.register_forward_pre_hook(hook_for(observer)) for module, observer in observers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_tokens(batches: Sequence[Mapping[str, Tensor]]) -> int:
    """Number of tokens in model inputs, padding excluded."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)
