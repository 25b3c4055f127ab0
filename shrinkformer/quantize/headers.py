"""What the headers of weight files say: types, shapes and bits, without reading a weight."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from shrinkformer.architectures import find_architecture
from shrinkformer.errors import CheckpointError
from shrinkformer.quantize.reading import find_format, read_shards

_LONGEST_HEADER = 100_000_000  # bytes; that of the safetensors library
_METADATA = "__metadata__"

READABLE = ("compressed-tensors", "gptq")
"""Methods whose weights this package reads."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a file describes it; ``dtype`` is the file's name for it, such as ``BF16``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes."""
        bits = re.search(r"\d+", self.dtype)
        return prod(self.shape) * int(bits[0] if bits else 8) // 8


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the safetensors files by name; nothing but headers is read, or mapped, however large a file is.

    Raises:
        CheckpointError: A file is damaged or missing.
    """
    if not any(folder.glob("*.safetensors*")):
        return {}
    return read_shards(folder, read_header)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises:
        CheckpointError: It is missing or damaged.

    Source:
        https://github.com/huggingface/safetensors, "Format": 8 bytes with the length of a JSON object, which says where
        behind it each tensor lies.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        ends = [part["data_offsets"][1] for name, part in header.items() if name != _METADATA]
        if 8 + length + max(ends, default=0) != file.stat().st_size:
            raise ValueError(f"{file.stat().st_size} bytes, the header says {8 + length + max(ends, default=0)}")
        return {
            name: StoredTensor(str(part["dtype"]), tuple(int(size) for size in part["shape"]))
            for name, part in header.items()
            if name != _METADATA
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{file.name} cannot be read ({error}); download the model again.") from None


def block_of(name: str, layers: str) -> int | None:
    """Number of the block that a tensor or module belongs to."""
    match = re.search(rf"(?:^|\.){re.escape(layers.rpartition('.')[2])}\.(\d{{1,6}})\.", name)
    return int(match[1]) if match else None


def read_quantization(config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, Any] | None:
    """Method of a quantized checkpoint, and the bits of every linear layer where they can be known.

    Returns:
        ``method``, ``bits`` (all numbers of bits), and ``layers``: number of the block, or None, name and bits; None
        for a checkpoint that is not quantized.

    Raises:
        CheckpointError: The configuration is damaged.
    """
    section = getattr(config, "quantization_config", None)
    if section is None:
        return None
    if not isinstance(section, dict):
        raise CheckpointError("quantization_config in config.json is no section; download the model again.")
    method = str(section.get("quant_method"))
    if method not in READABLE:  # we cannot say more about it
        bits = section.get("bits")
        return {"method": method, "bits": [bits] if isinstance(bits, int) else [], "layers": []}
    format_, layers = find_format(section), find_architecture(config.model_type).layers
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    modules = [
        name.removesuffix(f".{format_.suffixes[0]}") for name in tensors if name.endswith(f".{format_.suffixes[0]}")
    ]
    if tensors and not modules:
        raise CheckpointError(
            f"no {format_.suffixes[0]} tensor is in the files, although config.json says {method}; download "
            "the model again."
        )
    rows = [
        {"layer": block_of(name, layers), "name": name, "bits": format_.bits(name, shapes, section)} for name in modules
    ]
    rows.sort(key=lambda row: (row["layer"] is None, row["layer"] or 0, row["name"]))
    return {"method": method, "bits": sorted({row["bits"] for row in rows}), "layers": rows}
