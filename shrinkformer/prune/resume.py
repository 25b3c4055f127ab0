"""Finished blocks on disk, so that a crash or a kill costs one block at most."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.errors import InputError
from shrinkformer.prune.moments import Moments

_SAMPLES, _SAMPLE = 4_096, 4_096
"""Pieces of a large file, and bytes of each."""


def fingerprint(model: PreTrainedModel, weight_files: Iterable[Path] = ()) -> str:
    """A digest of the weights of a model.

    Args:
        model: The dense model; of blocks that are not in memory, only shapes enter.
        weight_files: Files of such a model, known by size, time of change and samples: reading them twice would take
            too long. Up to 16 MiB of a file are read, from its beginning and from everywhere.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in weight_files:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        for part in _samples(file):
            digest.update(part)
    for name, tensor in model.state_dict().items():
        _add(digest, name, tensor)
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """All of a small file, evenly spaced pieces of a large one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            place = max(number * _SAMPLE, (number * (size - _SAMPLE)) // (_SAMPLES - 1))
            if place >= size:
                return
            stream.seek(place)
            yield stream.read(_SAMPLE)


def examples_digest(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """A digest of calibration inputs; how they are put into batches and padded does not enter."""
    rows = []
    for batch in batches:
        mask = batch.get("attention_mask")
        for row in range(len(next(iter(batch.values())))):
            digest = hashlib.blake2b(digest_size=16)
            for name in sorted(batch):
                values = batch[name][row]
                padded = mask is not None and values.shape == mask[row].shape
                _add(digest, name, values[mask[row].bool()] if padded and mask is not None else values)
            rows.append(digest.digest())
    return hashlib.blake2b(b"".join(sorted(rows)), digest_size=16).hexdigest()


def texts_digest(texts: Iterable[str]) -> str:
    """A digest of texts in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def _add(digest: "hashlib.blake2b", name: str, tensor: Tensor) -> None:
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    if tensor.is_meta:
        return
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(raw.numpy().data)


class BlockFiles:
    """What is known about finished blocks, one file each; what is there already is taken up.

    Args:
        folder: Where the files are.
        key: Fingerprint of what they were computed from.

    Raises:
        InputError: What is there was computed from something else.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self._key = key
        for file in sorted(folder.glob("block*.safetensors")):
            if _read_key(file) != key:
                raise InputError(
                    f"--resume: {file} was computed from other weights, calibration examples or options; "
                    "repeat the earlier command exactly, or leave --resume out to start anew."
                )

    def holds(self, block: int) -> bool:
        """Whether a block is finished."""
        return self._file(block).exists()

    def clear(self) -> None:
        """Forget everything, at the end of a run."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _load(self, block: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(self._file(block), framework="pt") as file:
            # not a dictionary, and it knows fewer devices than torch
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}

    def _save(self, block: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Keep a block; the file appears whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file(block).with_suffix(".partial")
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"fingerprint": self._key, **(metadata or {})})
        os.replace(temporary, self._file(block))

    def _file(self, block: int) -> Path:
        return self._folder / f"block{block:04d}.safetensors"


class BlockStore(BlockFiles):
    """The moments of finished blocks."""

    def read(self, block: int, device: torch.device) -> dict[str, Moments] | None:
        """Moments of a finished block by sublayer, on a device, or None."""
        if not self.holds(block):
            return None
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self._load(block, device)[0].items():
            sublayer, entry = name.split(".")
            states.setdefault(sublayer, {})[entry] = tensor
        return {sublayer: Moments.from_state_dict(state) for sublayer, state in states.items()}

    def write(self, block: int, moments: Mapping[str, Moments]) -> None:
        """Keep the moments of a block."""
        self._save(
            block,
            {
                f"{sublayer}.{entry}": tensor
                for sublayer, state in moments.items()
                for entry, tensor in state.state_dict().items()
            },
        )


class WeightFiles(BlockFiles):
    """The weights of finished blocks, under any names, with some numbers."""

    def read(self, block: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weights of a finished block by name, on a device, and its numbers."""
        tensors, metadata = self._load(block, device)
        return tensors, json.loads(metadata["numbers"])

    def write(self, block: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Keep the weights of a block, and numbers that belong to it."""
        self._save(block, tensors, {"numbers": json.dumps(dict(numbers))})


def _read_key(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as tensors:
            return (tensors.metadata() or {}).get("fingerprint")
    except (OSError, SafetensorError):
        return None
