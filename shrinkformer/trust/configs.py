"""A configuration before anything is built from it: sizes that a model can have, and nothing that leads elsewhere."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shrinkformer.errors import CheckpointError
from shrinkformer.trust.foreign import shortened
from shrinkformer.trust.json_files import read_object

CONFIG = "config.json"

_WIDEST, _MOST_BLOCKS, _MOST_WORDS, _MOST_POSITIONS = 2**20, 10_000, 2**24, 2**31

LIMITS: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "dim", "n_embd", "embedding_size", "word_embed_proj_dim"), _WIDEST),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "n_inner"), _WIDEST),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "head_dim"), _WIDEST),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer"), _MOST_BLOCKS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _MOST_POSITIONS),
    "vocab_size": _MOST_WORDS,
    "type_vocab_size": _MOST_WORDS,
    "num_labels": _WIDEST,
}
"""Largest value of every size, under all names that configurations of transformers have for it."""

_MAY_BE_NULL = frozenset(("n_inner", "num_key_value_heads", "head_dim", "embedding_size", "word_embed_proj_dim"))
"""Those that transformers then derives from others."""

_LEADING_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), ("eager", "sdpa")),  # others may be code of a hub
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), ("eager",)),
    "transformers_weights": (),  # a file of any name
}
"""Entries by which transformers would fetch code, or read other weights than were checked, and harmless values."""

_SIZES_OF_BLOCKS = frozenset(("heads", "neurons", "query_width", "value_width"))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint as it is written, checked.

    Args:
        folder: Of the checkpoint.

    Raises:
        CheckpointError: It is no JSON, names no ``model_type``, has a size that no model has, or leads to other files.
    """
    file = folder / CONFIG
    config = read_object(file)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file} names no model_type; it is no configuration of transformers.")
    if not re.fullmatch(r"[\w.-]{1,64}", kind):
        raise CheckpointError(
            f"{file}: model_type is {shortened(repr(kind))}, which is no name; do not use this model."
        )
    for name, limit in LIMITS.items():
        if name in config and not (config[name] is None and name in _MAY_BE_NULL):
            _require_size(config[name], limit, name, file)
    for name, value in config.items():
        _require_figure(name, value, file)
    _require_labels(config, file)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{file}: architectures is {shortened(repr(names))}, not a list of class names.")
    for name in ("quantization_config", "shrinkformer"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{file}: {name} is {shortened(repr(config[name]))}, not a section {{...}}.")
    for name, usual in _LEADING_ELSEWHERE.items():
        if config.get(name) not in (None, *usual):
            raise CheckpointError(f"{file}: {name} is {shortened(repr(config[name]))}; remove this entry.")
    return config


def _require_size(value: Any, limit: int, name: str, file: Path) -> None:
    if type(value) is not int or not 0 < value <= limit:
        least = "a whole number from 1 to"
        raise CheckpointError(f"{file}: {name} is {shortened(repr(value))}; it must be {least} {limit:,}.")


def _require_figure(name: str, value: Any, file: Path) -> None:
    """Check types of numbers, and what is a share or a small number by its name."""
    share, small = name.endswith(("dropout", "dropout_prob", "pdrop", "layerdrop")), name.endswith(("_eps", "_epsilon"))
    if (share or small) and value is not None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 <= value <= 1) or (small and value == 0):
            raise CheckpointError(f"{file}: {name} is {shortened(repr(value))}; it must be a number from 0 to 1.")
    if name in {"dtype", "torch_dtype"} and value is not None:
        known = isinstance(value, str) and getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(known, torch.dtype):
            raise CheckpointError(f"{file}: {name} is {shortened(repr(value))}; it must be a type such as 'float32'.")


def _require_labels(config: Mapping[str, Any], file: Path) -> None:
    labels = config.get("id2label")
    if labels is None:
        return
    if not isinstance(labels, dict) or not labels or not all(str(key).isdecimal() for key in labels):
        raise CheckpointError(f"{file}: id2label is {shortened(repr(labels))}; it must name labels by their numbers.")


def require_section(config: Mapping[str, Any], record: Mapping[str, Any], blocks: int, file: Path) -> None:
    """Check what this package wrote into the configuration of a pruned model, if it did.

    Args:
        config: From :func:`read_config`.
        record: The architecture record of its family, as a dictionary.
        blocks: Number of blocks that it says.
        file: For messages.

    Raises:
        CheckpointError: Sizes are missing or absurd, or it describes blocks of another family.
    """
    section = config.get("shrinkformer")
    if not section:
        return
    layers, written = section.get("layers"), section.get("architecture")
    if not isinstance(layers, list) or len(layers) != blocks:
        found = len(layers) if isinstance(layers, list) else shortened(repr(layers))
        raise CheckpointError(f"{file}: shrinkformer.layers has {found} entries for {blocks} blocks; prune again.")
    for index, sizes in enumerate(layers):
        if not isinstance(sizes, dict) or not {"heads", "neurons"} <= set(sizes) <= _SIZES_OF_BLOCKS:
            raise CheckpointError(f"{file}: shrinkformer.layers[{index}] holds no heads and neurons; prune again.")
        for name, value in sizes.items():
            if not (value is None and name.endswith("width")):
                _require_size(value, _WIDEST, f"shrinkformer.layers[{index}].{name}", file)
    if not isinstance(written, dict) or not _agrees(written, record):
        family = config["model_type"]
        raise CheckpointError(f"{file}: shrinkformer.architecture is not that of a {family}; prune again.")


def _agrees(written: Any, known: Any) -> bool:
    """Whether all that is written is what we know; what other versions wrote beside it does not matter."""
    if isinstance(written, Mapping) and isinstance(known, Mapping):
        needed = ("layers", "attention", "feed_forward")
        present = all(name in written for name in needed if name in known)
        return present and all(_agrees(value, known[name]) for name, value in written.items() if name in known)
    if isinstance(written, Sequence) and isinstance(known, Sequence) and not isinstance(written, str):
        return list(written) == list(known)
    return bool(written == known)
