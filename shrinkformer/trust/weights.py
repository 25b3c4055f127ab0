"""Weight files by their headers and tables alone: nothing is mapped, unpacked or run before it was found consistent."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shrinkformer.errors import CheckpointError
from shrinkformer.trust.foreign import foreign_errors, reason_of, shortened
from shrinkformer.trust.json_files import parse_json, read_object

SAFE_WEIGHTS, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"

BIN_WEIGHTS, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

WEIGHT_FILES = (SAFE_WEIGHTS, SAFE_INDEX, BIN_WEIGHTS, BIN_INDEX)
"""In the order in which transformers looks for them."""

_LONGEST_HEADER = 100_000_000  # bytes; that of the safetensors library
_LONGEST_INDEX = 256 * 2**20
_METADATA = "__metadata__"
_AGAIN = "download the model again."

Found = TypeVar("Found")


FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""Types of floating-point numbers that stand for themselves, by the names that files have for them."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a file describes it; ``dtype`` is the file's name for it, such as ``BF16``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_number(self) -> bool:
        """Whether it holds floating-point numbers that stand for themselves."""
        return self.dtype in FLOATING

    @property
    def bytes(self) -> int:
        """What it takes."""
        return prod(self.shape) * _bits_of(self.dtype) // 8


def _bits_of(dtype: str) -> int:
    """Bits of one number, from the file's name for the type."""
    match = re.fullmatch(r"(?:BOOL|(?:BF|[FIUC])(\d{1,3})(?:_\w+)?)", dtype)
    if match is None:
        raise ValueError(f"the type {shortened(dtype)!r}, which is unknown")
    return int(match[1] or 8)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises:
        CheckpointError: It is missing or damaged: a length that the file has not, a type that there is not, sizes that
            do not fit types and shapes, or numbers of two tensors, or of none, in the same place.

    Source:
        https://github.com/huggingface/safetensors, "Format": 8 bytes with the length of a JSON object, which says where
        behind it each tensor lies.
    """
    try:
        if not file.is_file():
            raise CheckpointError(f"{file.name} is not there, or no ordinary file; {_AGAIN}")
        with file.open("rb") as stream:
            size, length = file.stat().st_size, int.from_bytes(stream.read(8), "little")
            if length > min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = parse_json(stream.read(length), f"the header of {file.name}", unique=True)
        return _checked(header, size - 8 - length)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{file.name} cannot be read ({reason_of(error)}); {_AGAIN}") from None


def _checked(header: Mapping[str, Any], size: int) -> dict[str, StoredTensor]:
    """The tensors of a header that describes all of so many bytes."""
    tensors: dict[str, StoredTensor] = {}
    places = [(0, 0), (size, size)]
    for name, part in header.items():
        if name == _METADATA:
            continue
        shape, (start, end) = part["shape"], part["data_offsets"]
        for number in (*shape, start, end):
            if type(number) is not int or number < 0:
                raise ValueError(f"{shortened(name)} has the size or offset {shortened(str(number))}")
        tensors[name] = StoredTensor(str(part["dtype"]), tuple(shape))
        if tensors[name].bytes != end - start:
            raise ValueError(f"{shortened(name)} has {end - start:,} bytes for shape {shape} of {part['dtype']}")
        places.append((start, end))
    for (_, end), (start, _) in pairwise(sorted(places)):
        if start != end:
            raise ValueError(f"the tensors do not fill the {size:,} bytes of the file: byte {end:,} to {start:,}")
    return tensors


def read_shards(folder: Path, read: Callable[[Path], Mapping[str, Found]]) -> dict[str, Found]:
    """What is found of every tensor of a model with safetensors files, by name.

    Args:
        folder: Of the model, with one file of weights, or with an index of several.
        read: What is found in one file, by tensor.

    Raises:
        CheckpointError: A tensor of the index is in none of the files, or the index is damaged.
    """
    index = folder / SAFE_INDEX
    places = weight_map(index) if index.exists() else {}
    if places and (folder / SAFE_WEIGHTS).exists() and set(places.values()) != {SAFE_WEIGHTS}:
        raise CheckpointError(f"{folder} holds {SAFE_WEIGHTS} and an index of other files; remove one of them.")
    return _from_shards(folder, places, SAFE_WEIGHTS, read)


def _from_shards(
    folder: Path, places: Mapping[str, str], single: str, read: Callable[[Path], Mapping[str, Found]]
) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for shard in sorted(set(places.values())) or [single]:
        found |= read(folder / shard)
    for name in places:
        if name not in found:
            raise CheckpointError(f"{name} is in the index of {folder} but in none of its files; {_AGAIN}")
    return found


def block_of(name: str, layers: str) -> int | None:
    """Number of the block that a tensor or module belongs to, by the path of the list of blocks."""
    match = re.search(rf"(?:^|\.){re.escape(layers.rpartition('.')[2])}\.(\d{{1,6}})\.", name)
    return int(match[1]) if match else None


def weight_map(index: Path, *, present: bool = True) -> dict[str, str]:
    """File by tensor, from the index of a folder; files lie in the folder itself.

    Args:
        index: The file.
        present: Whether the files that it names must be there.

    Raises:
        CheckpointError: The index is damaged, or names a file elsewhere or one that is not there.
    """
    content = read_object(index, longest=_LONGEST_INDEX)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{index} is no index of weights: it has no weight_map of names; {_AGAIN}")
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.isprintable():
            raise CheckpointError(f"{index} names {shard!r}, which is outside of its folder; do not use this model.")
        if present and not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names {shard}, which is not there; {_AGAIN}")
    return places


def read_weight_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name, whatever kind of files they are in; none where there are no weights.

    Raises:
        CheckpointError: A file is damaged, missing, or not what it says it is.
    """
    if (folder / SAFE_WEIGHTS).exists() or (folder / SAFE_INDEX).exists():
        return read_shards(folder, read_header)
    if (folder / BIN_WEIGHTS).exists():
        return read_bin_header(folder / BIN_WEIGHTS)
    if (folder / BIN_INDEX).exists():
        return _from_shards(folder, weight_map(folder / BIN_INDEX), BIN_WEIGHTS, read_bin_header)
    return {}


def read_bin_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a ``.bin`` file of torch by name; it is a pickle, of which nothing but tensors is built.

    Raises:
        CheckpointError: It is damaged or holds something else.
    """
    packed = require_plain_archive(file)
    remedy = "convert it to safetensors where it was made; nothing of it was run."
    with foreign_errors(CheckpointError, f"{file} cannot be read", _AGAIN), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of odd pickles before it refuses them
        try:
            found = torch.load(file, map_location="meta", weights_only=True, mmap=packed)
        except pickle.UnpicklingError as error:
            called = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
            if called is None:
                raise CheckpointError(f"{file} is no file of weights; {_AGAIN}") from None
            raise CheckpointError(f"{file} holds more than tensors ({called[1]}); {remedy}") from None
        except (UnicodeDecodeError, ValueError, EOFError) as error:
            raise CheckpointError(f"{file} is no file of weights ({reason_of(error)}); {_AGAIN}") from None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{file} holds no weights by name but {type(found).__name__}; {remedy}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{file}: {shortened(str(name))} is no ordinary tensor; {remedy}")
        if tensor.nbytes > file.stat().st_size:
            raise CheckpointError(
                f"{file}: {shortened(name)} of shape {tuple(tensor.shape)} is larger than the file; {_AGAIN}"
            )
    return {name: StoredTensor(_NAMES.get(tensor.dtype, "U8"), tuple(tensor.shape)) for name, tensor in found.items()}


_NAMES = {
    **{dtype: name for name, dtype in FLOATING.items()},
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def require_plain_archive(file: Path) -> bool:
    """Check that the archive which a ``.bin`` file is packs nothing: torch does not, and bombs do.

    Returns:
        Whether it is an archive; torch wrote none before version 1.6.

    Raises:
        CheckpointError: It is no file, or its parts are packed or more than it has room for.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not there, or no ordinary file; {_AGAIN}")
    with file.open("rb") as stream:
        packed = stream.read(2) == b"PK"
    if not packed:
        return False
    with foreign_errors(CheckpointError, f"{file} is no archive of torch", _AGAIN), zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size or part.flag_bits & 1:
            raise CheckpointError(
                f"{file}: {shortened(part.filename)} is packed, {part.compress_size:,} bytes for {part.file_size:,}; "
                "torch does not write such files, do not use this one."
            )
    if not any(part.filename.endswith("/data.pkl") for part in parts):
        raise CheckpointError(f"{file} is no archive of torch: it has no data.pkl; {_AGAIN}")
    total, size = sum(part.file_size for part in parts), file.stat().st_size
    if total > size or len({part.filename for part in parts}) != len(parts):
        raise CheckpointError(f"{file}: its parts have {total:,} bytes, the file {size:,}; do not use this file.")
    return True
