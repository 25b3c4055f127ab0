"""Weights written in the hub's format as they become ready, one file at a time."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from shrinkformer.errors import CheckpointError
from shrinkformer.utils.files import write_atomically


class ShardWriter:
    """Collects tensors and writes them to safetensors files of limited size, which ``from_pretrained`` reads.

    Only the tensors of the file that comes next are in memory. Tied weights are passed once, under the name that
    ``save_pretrained`` gives them.

    Args:
        folder: Where the files go; weights that are there already are replaced by :meth:`finish`.
        max_shard_bytes: Size of a file, unless a single tensor is larger.
    """

    def __init__(self, folder: Path, max_shard_bytes: float = 5e9) -> None:
        self._folder, self._limit = folder, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []  # names in each finished file
        self._total_bytes = self._total_parameters = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it must not be changed in place before :meth:`finish`.

        Raises:
            CheckpointError: The name was there before.
        """
        if name in self._pending or any(name in names for names in self._shards):
            raise CheckpointError(f"{name} would be written to {self._folder} twice; weights need names of their own.")
        tensor = _standalone(tensor)
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._write()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._total_parameters += tensor.numel()

    def finish(self) -> list[Path]:
        """Write what is left, give the files their names and write the index, if there is more than one.

        Returns:
            The files with weights.

        Raises:
            CheckpointError: There are no weights.
        """
        if self._pending:
            self._write()
        if not self._shards:
            raise CheckpointError(f"no weights were passed for {self._folder}; add the tensors before finish().")
        self._remove_earlier_weights()
        count = len(self._shards)
        files = [self._folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            files = [self._folder / SAFE_WEIGHTS_NAME]
        for number, file in enumerate(files):
            os.replace(self._partial(number), file)
        if count > 1:
            write_atomically(self._folder / SAFE_WEIGHTS_INDEX_NAME, self._index(files))
        return files

    def _write(self) -> None:
        save_file(self._pending, self._partial(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self._folder / f".model-{number + 1:05d}.partial"

    def _remove_earlier_weights(self) -> None:
        for pattern in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors"):
            for file in self._folder.glob(pattern):
                file.unlink()

    def _index(self, files: list[Path]) -> str:
        """Source: ``PreTrainedModel.save_pretrained`` of transformers, which also counts parameters and bytes."""
        index = {
            "metadata": {"total_parameters": self._total_parameters, "total_size": self._total_bytes},
            "weight_map": {name: file.name for file, names in zip(files, self._shards, strict=True) for name in names},
        }
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _standalone(tensor: Tensor) -> Tensor:
    """A contiguous tensor on the CPU that keeps no more memory alive than its own."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
