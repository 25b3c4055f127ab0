"""How much room a model takes: parameters, bytes of the checkpoint, peak memory."""

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from shrinkformer.errors import CheckpointError

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_METADATA = {"format": "pt"}


def count_parameters(model: nn.Module) -> int:
    """Numbers in the parameters of a model; a tied weight counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the one safetensors file that parameters and persistent buffers make; a tied weight counts once.

    Nothing is written: the file is 8 bytes, a JSON header padded to a multiple of 8, and the raw tensors
    (https://github.com/huggingface/safetensors, "Format"). With ties, the header's length is right to a few bytes only
    (which of the names is kept is the writer's choice).
    """
    header: dict[str, object] = {"__metadata__": _METADATA}
    offset = 0
    for name, tensor in sorted(_stored_tensors(model), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        kind = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in the state dict, the first name only of what shares its memory."""
    seen: set[tuple[int, int, torch.Size, tuple[int, ...]] | int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        pointer = 0 if tensor.device.type == "meta" else tensor.data_ptr()  # meta and empty tensors have no memory
        key = (pointer, tensor.storage_offset(), tensor.shape, tensor.stride()) if pointer else id(tensor)
        if key not in seen:
            seen.add(key)
            yield name, tensor


def folder_bytes(path: str | Path) -> int:
    """Bytes of the weight files of a checkpoint folder.

    These are ``*.safetensors``; if there are none ``pytorch_model*.bin``, else ``*.onnx`` with ``*.onnx.data``.

    Raises:
        CheckpointError: no weight file is there.
    """
    folder = Path(path)
    kinds = (("*.safetensors",), ("pytorch_model*.bin",), ("*.onnx", "*.onnx.data"))
    found = ([file for pattern in kind for file in folder.glob(pattern)] for kind in kinds)
    files = next((group for group in found if group), [])
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors, pytorch_model*.bin or *.onnx here; is it a checkpoint?")
    return sum(file.stat().st_size for file in files)


def peak_memory_bytes(device: str | torch.device = "cpu") -> int:
    """Most memory used so far, in bytes.

    Args:
        device: ``cuda``: most bytes of tensors since the last reset (``PeakMemory`` resets). Anything else: the
            high-water mark of the resident set of this process, which never falls again.
    """
    place = torch.device(device)
    if place.type == "cuda":
        return int(torch.cuda.max_memory_allocated(place))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kibibytes


class PeakMemory:
    """Context manager that notes the peak memory of what runs inside it.

    On CUDA the peak is that of the block; on the CPU it is the process's high-water mark at the end of the block.

    >>> with PeakMemory() as memory:
    ...     numbers = list(range(1000))
    >>> memory.bytes > 0
    True
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bytes = peak_memory_bytes(self.device)
