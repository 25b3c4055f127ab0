"""Examples on their way through a model, one block at a time.

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

from shrinkformer.architectures import layer_views, require_alike
from shrinkformer.prune.hidden import Offload, hidden_states
from shrinkformer.utils.inputs import call, model_inputs, outputs_of, token_mask, token_rows_of

Observer = Callable[[Tensor], None]

_BUFFERED_ROWS = 4096


class _FirstBlockReached(Exception):  # noqa: N818
    """Ends a forward pass whose remaining blocks nobody needs."""


@dataclass(frozen=True)
class _Arguments:
    """What the first block got beside the hidden states; every block gets the same."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor  # (rows, length), True where there is a token


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
    """The hidden states of all examples at the entrance of one block.

    Args:
        model: A model in evaluation mode; its blocks need no weights yet, everything around them does.
        batches: Model inputs with an ``attention_mask``; padding never reaches an observer.
        offload: Where hidden states go; None keeps them on the model's device.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], offload: Offload | None = None
    ) -> None:
        require_alike(model, "pass it block by block")
        self._model = model
        self._batches = batches
        self._hidden = hidden_states(offload, model.device)
        self._arguments: list[_Arguments] = []
        self._gives_tuples = False
        shared: dict[torch.Size, _Arguments] = {}  # without padding, arguments depend on the shape only
        for index, batch in enumerate(batches):
            hidden, arguments = _record(model, batch)
            self._hidden[index] = hidden
            if arguments.mask.all():
                arguments = shared.setdefault(arguments.mask.shape, arguments)
            self._arguments.append(arguments)

    @property
    def tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return count_tokens(self._batches)

    @torch.no_grad()
    def run(self, block: nn.Module, observers: Mapping[nn.Module, Observer] | None = None) -> None:
        """Send all examples through a block.

        Args:
            block: The next block.
            observers: For a layer inside the block, a function that gets the rows of its input, ``(tokens, features)``.
        """
        buffers = {module: _RowBuffer(observer) for module, observer in (observers or {}).items()}
        for index, arguments in enumerate(self._arguments):
            with _observed(buffers, arguments.mask):
                self._hidden[index] = self.call(block, index)
        for buffer in buffers.values():
            buffer.flush()

    def __len__(self) -> int:
        return len(self._arguments)

    def mask(self, index: int) -> Tensor:
        """Where the tokens of a micro-batch are, ``(examples, length)`` bool."""
        return self._arguments[index].mask

    def hidden(self, index: int) -> Tensor:
        """The hidden states of a micro-batch at the entrance of the next block, ``(examples, length, hidden size)``."""
        return self._hidden[index]

    def replace(self, index: int, hidden: Tensor) -> None:
        """Put the hidden states of a micro-batch where the next block will find them."""
        self._hidden[index] = hidden

    @torch.no_grad()
    def call(self, block: nn.Module, index: int) -> Tensor:
        """What a block makes of a micro-batch; the stream stays where it is."""
        arguments = self._arguments[index]
        output = block(self._hidden[index], *arguments.args, **arguments.kwargs)
        self._gives_tuples = isinstance(output, tuple)
        hidden: Tensor = output[0] if self._gives_tuples else output
        return hidden

    @torch.no_grad()
    def outputs(self) -> Iterator[Any]:
        """What the whole model makes of the hidden states behind the last block: its own output for each batch.

        The model's own code runs, with one stand-in for all of its blocks that hands out the hidden states.
        """
        stand_in = _StandIn(self._gives_tuples)
        with _blocks_replaced(self._model, stand_in):
            for index, batch in enumerate(self._batches):
                stand_in.hidden = self._hidden[index]
                yield outputs_of(self._model, batch)


class _StandIn(nn.Module):
    """Takes the place of all blocks and ignores its input."""

    def __init__(self, gives_tuples: bool) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self._gives_tuples = gives_tuples

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.hidden,) if self._gives_tuples else self.hidden


@contextmanager
def _blocks_replaced(model: PreTrainedModel, stand_in: nn.Module) -> Iterator[None]:
    path = layer_views(model)[0].architecture.layers
    base: nn.Module = model.base_model
    blocks = base.get_submodule(path)
    base.set_submodule(path, nn.ModuleList([stand_in]))
    try:
        yield
    finally:
        base.set_submodule(path, blocks)


@torch.no_grad()
def _record(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, _Arguments]:
    recorded: list[tuple[Tensor, _Arguments]] = []
    inputs = model_inputs(model.base_model, token_rows_of(batch))

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        recorded.append((hidden, _Arguments(tuple(rest), kwargs, token_mask(batch).to(hidden.device))))
        raise _FirstBlockReached

    handle = layer_views(model)[0].block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call(model.base_model, inputs)
    except _FirstBlockReached:
        pass
    finally:
        handle.remove()
    return recorded[0]


@contextmanager
def _observed(observers: Mapping[nn.Module, Observer], mask: Tensor) -> Iterator[None]:
    def hook_for(observer: Observer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            observer(token_rows(args[0], mask))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(observer)) for module, observer in observers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_rows(tensor: Tensor, mask: Tensor) -> Tensor:
    """The tokens among what a layer saw, ``(tokens, features)``; OPT flattens examples and positions."""
    if mask.all():  # spares a copy
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(*mask.shape, tensor.shape[-1])[mask]


def mean_length(batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean number of tokens of a row, padding excluded."""
    masks = [token_mask(batch) for batch in batches]
    return sum(int(mask.sum()) for mask in masks) / sum(map(len, masks))


def count_tokens(batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Number of tokens in model inputs, padding excluded."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)
