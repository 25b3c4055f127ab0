"""Finished blocks of a calibration on disk, so that a crash or a kill costs one block at most."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.errors import InputError
from shrinkformer.prune.moments import Moments


def fingerprint(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], weight_files: Iterable[Path] = ()
) -> str:
    """A digest of the weights of a model and of its calibration inputs: statistics belong to both.

    Args:
        model: The dense model; of blocks that are not in memory, only shapes enter.
        batches: The calibration inputs.
        weight_files: Files of such a model, known by size and time of change: reading them twice would take too long.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in weight_files:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for name, tensor in model.state_dict().items():
        _add(digest, name, tensor)
    for batch in batches:
        for name in ("input_ids", "attention_mask"):
            _add(digest, name, batch[name])
    return digest.hexdigest()


def _add(digest: "hashlib.blake2b", name: str, tensor: Tensor) -> None:
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    if tensor.is_meta:
        return
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(raw.numpy().data)


class BlockStore:
    """The moments of finished blocks, one file each.

    Args:
        folder: Where the files are.
        key: Fingerprint of what they were computed from.
        resume: Take up what is there; otherwise it is deleted.

    Raises:
        InputError: What is there was computed from something else.
    """

    def __init__(self, folder: Path, key: str, *, resume: bool) -> None:
        self._folder = folder
        self._key = key
        if not resume:
            self.clear()
        for file in sorted(folder.glob("block*.safetensors")):
            if _read_key(file) != key:
                raise InputError(
                    f"--resume: {file} was computed from other weights or calibration examples; "
                    "repeat the earlier command exactly, or leave --resume out to start anew."
                )

    def holds(self, block: int) -> bool:
        """Whether the moments of a block are there."""
        return self._file(block).exists()

    def read(self, block: int, device: torch.device) -> dict[str, Moments] | None:
        """Moments of a finished block by sublayer, on a device, or None."""
        file = self._file(block)
        if not self.holds(block):
            return None
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            states: dict[str, dict[str, Tensor]] = {}
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                sublayer, entry = name.split(".")
                states.setdefault(sublayer, {})[entry] = tensors.get_tensor(name)
        return {sublayer: Moments.from_state_dict(state) for sublayer, state in states.items()}

    def write(self, block: int, moments: Mapping[str, Moments]) -> None:
        """Keep the moments of a block; the file appears whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{sublayer}.{entry}": tensor.cpu().contiguous()
            for sublayer, state in moments.items()
            for entry, tensor in state.state_dict().items()
        }
        temporary = self._file(block).with_suffix(".partial")
        save_file(tensors, temporary, metadata={"fingerprint": self._key})
        os.replace(temporary, self._file(block))

    def clear(self) -> None:
        """Forget everything, at the end of a run."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, block: int) -> Path:
        return self._folder / f"block{block:04d}.safetensors"


def _read_key(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as tensors:
            return (tensors.metadata() or {}).get("fingerprint")
    except (OSError, SafetensorError):
        return None
