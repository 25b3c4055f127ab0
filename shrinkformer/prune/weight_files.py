"""Weight files tensor by tensor, under the names that are stored there."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from shrinkformer.errors import CheckpointError
from shrinkformer.trust.weights import require_plain_archive, weight_map


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of every stored tensor by its stored name; files are looked for in the order of ``from_pretrained``.

    Raises:
        CheckpointError: There are none.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix == ".json":
            return {key: folder / shard for key, shard in weight_map(file).items()}
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return dict.fromkeys(tensors.keys(), file)
        return dict.fromkeys(_load_bin(file), file)
    raise CheckpointError(f"{folder} has no {SAFE_WEIGHTS_NAME}, no {WEIGHTS_NAME} and no index of several files.")


def read_tensors(file: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file with their stored names; of a safetensors file, each is read through a mapping of its own."""
    if file.suffix == ".safetensors":
        for name in names:
            with safe_open(file, framework="pt") as tensors:
                yield name, tensors.get_tensor(name)
    else:
        tensors = _load_bin(file)
        yield from ((name, tensors[name]) for name in names)


def _load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file; mapped, not read, unless PyTorch wrote it before version 1.6."""
    mapped = require_plain_archive(file)
    tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    return tensors
