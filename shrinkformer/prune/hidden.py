"""Hidden states of many examples: on the device, in main memory, or on disk."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from shrinkformer.utils.files import scratch_beside


@dataclass
class Held:
    """How many bytes are held at the moment, by all who share a limit."""

    bytes: int = 0


@dataclass(frozen=True)
class Offload:
    """Where data goes that does not fit beside the model.

    Attributes:
        directory: A folder for large temporary files.
        limit: Bytes of hidden states that may stay in main memory, of all streams together.
        shared: Counts them.
    """

    directory: Path
    limit: int
    shared: Held = field(default_factory=Held, compare=False)


class HiddenStates(Protocol):
    """Hidden states by index of the micro-batch."""

    def __getitem__(self, index: int) -> Tensor:
        """The hidden states of one micro-batch, ``(examples, length, hidden size)``, on the device."""

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        """Keep the hidden states of one micro-batch."""


class Resident(dict[int, Tensor]):
    """Hidden states that stay on the device."""


class Spilled:
    """Hidden states in main memory up to a limit, beyond it in files, one for each micro-batch.

    Files are read and written whole, not mapped: mapped pages would count as memory of this process.
    """

    def __init__(self, offload: Offload, device: torch.device) -> None:
        self._limit, self._shared, self._held, self._device = offload.limit, offload.shared, 0, device
        offload.directory.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(scratch_beside(offload.directory / "hidden"))
        finalize(self, self._stack.close)  # hidden states are as large as the disk may be
        self._in_memory: dict[int, Tensor] = {}
        self._on_disk: dict[int, tuple[torch.dtype, torch.Size]] = {}

    def __getitem__(self, index: int) -> Tensor:
        if index in self._in_memory:
            return self._in_memory[index].to(self._device)
        dtype, shape = self._on_disk[index]
        raw = np.fromfile(self._file(index), dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype).view(shape).to(self._device)

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        size = hidden.numel() * hidden.element_size()
        if index in self._in_memory:
            self._hold(-self._in_memory.pop(index).nbytes)
        if index not in self._on_disk and self._shared.bytes + size <= self._limit:
            self._in_memory[index] = hidden.cpu()
            self._hold(size)
            return
        raw = hidden.detach().cpu().contiguous()
        raw.view(-1).view(torch.uint8).numpy().tofile(self._file(index))
        self._on_disk[index] = hidden.dtype, hidden.shape

    def _hold(self, size: int) -> None:
        self._held += size
        self._shared.bytes += size

    def __del__(self) -> None:
        self._shared.bytes -= self._held

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.bin"


def hidden_states(offload: Offload | None, device: torch.device) -> HiddenStates:
    """A place for hidden states: on the device, or as ``offload`` says."""
    return Resident() if offload is None else Spilled(offload, device)
