"""Models larger than memory: one block at a time is read from the checkpoint, everything else stays.

transformers loads a model whose list of blocks is empty: it passes their weights over without reading them. Then the
blocks are put back without weights (on torch's ``meta`` device), and an algorithm asks for one after the other. Files
are mapped for as long as a tensor is read, and no longer, because mapped pages count as memory of the process.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from shrinkformer.architectures import find_architecture, layer_views
from shrinkformer.errors import CheckpointError
from shrinkformer.prune import pruned_modeling
from shrinkformer.prune.health import require_finite
from shrinkformer.prune.opening import load_pretrained
from shrinkformer.prune.pruned_modeling import pruned_class
from shrinkformer.prune.tensors import require_used, stored_names
from shrinkformer.prune.weight_files import read_tensors, weight_files
from shrinkformer.trust.weights import block_of

_ALIGNMENT = 64  # bytes; what torch's own allocator keeps on CPUs
_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


class OnDisk:
    """Blocks that have weights only while they are asked for.

    Args:
        blocks: The blocks, on the meta device.
        places: For each block, the file and the name there of every tensor of its ``state_dict``.
        device: Where a resident block is.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], places: Sequence[Mapping[str, tuple[Path, str]]], device: str | torch.device
    ) -> None:
        self._blocks, self._places, self._device = blocks, places, device
        self._users = [0] * len(blocks)
        self._checked: set[int] = set()

    @contextmanager
    def resident(self, block: int) -> Iterator[nn.Module]:
        """Read the weights of a block, and forget them at the end together with all changes made to them.

        Raises:
            CheckpointError: The weights in the file do not fit the block.
            NumericalError: One of them is NaN or infinite; each block is looked at when it is read first.
        """
        module = self._blocks[block]
        if self._users[block] == 0:
            self._read(block)
        self._users[block] += 1
        try:
            yield module
        finally:
            self._users[block] -= 1
            if self._users[block] == 0:
                module.to("meta")

    def _read(self, block: int) -> None:
        module, places = self._blocks[block], self._places[block]
        targets = _one_piece(module.state_dict(), self._device)
        for file in sorted({file for file, _ in places.values()}):
            names = {stored: name for name, (place, stored) in places.items() if place == file}
            for stored, tensor in read_tensors(file, names):
                target = targets.get(names[stored])
                if target is None or target.shape != tensor.shape or targets.keys() != places.keys():
                    raise CheckpointError(
                        f"block {block} has other tensors than {file} ({stored}: {tuple(tensor.shape)}); load the "
                        "checkpoint with its own config.json, and change copies of blocks only."
                    )
                if block not in self._checked:
                    require_finite([(f"{stored} in {file}", tensor)])
                target.copy_(tensor.to(self._device))  # travels as it is stored, which may be smaller
                if block not in self._checked and target.dtype != tensor.dtype:
                    require_finite([(f"{stored} in {file}", target)], stored=tensor.dtype)
        self._checked.add(block)
        module.load_state_dict(targets, assign=True)


def _one_piece(tensors: Mapping[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors of the given shapes and types, all in one allocation.

    Tensors of a few megabytes each leave holes in the heap that the next block does not fit into, and memory would grow
    from block to block; a large piece is given back to the system.
    """
    starts = list(accumulate((-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()), initial=0))
    piece = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    return {
        name: piece[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, (name, tensor) in zip(starts[:-1], tensors.items(), strict=True)
    }


def load_lazily(
    model_class: Any,
    location: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, OnDisk]:
    """Load a model without the weights of its blocks.

    Args:
        model_class: A class of transformers, or one of its Auto classes.
        location: A folder, which may come from this package, or a name on the hub. Safetensors or ``.bin`` files, one
            or many; they must stay where they are.
        dtype: Of all weights.
        device: Where everything but the blocks is, and a resident block.
        config: The configuration, if it was read before.
        **kwargs: Passed to ``from_pretrained``.

    Returns:
        The model in evaluation mode, its blocks on the meta device, and the access to them.

    Raises:
        CheckpointError: A block has no weights in the checkpoint, or has them in a form that must be converted.
        UnsupportedModelError: No architecture record fits.
    """
    options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    if config is None:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False, **options)
    stock = _concrete_class(model_class, config)
    path = find_architecture(config.model_type).layers
    taken: list[nn.Module] = []
    emptied = _without_blocks(stock, path, taken)
    model = load_pretrained(emptied, location, config=config, dtype=dtype, **kwargs)
    model.to(device)
    model.__class__ = stock
    model._keys_to_ignore_on_load_unexpected -= {_names_of_blocks(path)}  # not of its class but its own by now
    _put_submodule(model.base_model, path, taken[-1])
    model.eval()  # once more, for the blocks
    files = weight_files(Path(cached_file(location, "config.json", **options)).parent)
    return model, OnDisk([view.block for view in layer_views(model)], _find_blocks(model, files), device)


def _concrete_class(model_class: Any, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model; of this package when it wrote the checkpoint."""
    pruned = bool(getattr(config, "shrinkformer", None))
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        dense = copy.deepcopy(config)
        if pruned:
            dense.per_layer_config = None  # the stock class, which is asked here, knows one size for all blocks
        with torch.device("meta"):
            model_class = type(model_class.from_config(dense, trust_remote_code=False))
    return pruned_class(model_class) if pruned and model_class.__module__ != pruned_modeling.__name__ else model_class


def _without_blocks(stock: type[PreTrainedModel], path: str, taken: list[nn.Module]) -> type[PreTrainedModel]:
    """A class whose models lose their list of blocks when they are made; it is appended to ``taken``."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        stock.__init__(self, *args, **kwargs)
        taken.append(self.base_model.get_submodule(path))
        _put_submodule(self.base_model, path, nn.ModuleList())

    ignored = [*(stock._keys_to_ignore_on_load_unexpected or ()), _names_of_blocks(path)]
    members = {"__init__": __init__, "__module__": stock.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    return type(stock.__name__, (stock,), members)


def _names_of_blocks(path: str) -> str:
    return rf"(^|\.){re.escape(path)}\.\d+\."


def _put_submodule(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)


def _find_blocks(model: PreTrainedModel, files: Mapping[str, Path]) -> list[dict[str, tuple[Path, str]]]:
    """File and stored name of every tensor of every block."""
    stored = stored_names(model, files)
    path, unused = find_architecture(model.config.model_type).layers, files.keys() - stored.values()
    inside = [name for name in unused if block_of(name, path) is not None]  # the rest was looked at when it was loaded
    require_used(model, inside, f"{next(iter(files.values())).parent}: ")
    paths = {module: path for path, module in model.named_modules()}
    blocks: list[dict[str, tuple[Path, str]]] = []
    for view in layer_views(model):
        names = dict.fromkeys([*view.block.state_dict(), *(name for name, _ in view.block.named_buffers())])
        whole = {name: f"{paths[view.block]}.{name}" for name in names}
        missing = [name for name in whole.values() if name not in stored]
        if missing:
            raise CheckpointError(
                f"{next(iter(files.values())).parent} lacks {missing[0]} ({len(missing)} of {len(names)} tensors of "
                f"block {view.index}), or holds it in a form that transformers must convert; load it into memory."
            )
        blocks.append({name: (files[stored[path]], stored[path]) for name, path in whole.items()})
    return blocks
