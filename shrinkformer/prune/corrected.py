"""A configuration corrected by what the files of its checkpoint show: they are the model, it only describes them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from shrinkformer.architectures import DECODERS, Architecture
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import CheckpointError, warn
from shrinkformer.prune.outlines import outline, stock_classes
from shrinkformer.prune.surgery import kept_sizes
from shrinkformer.prune.tensors import is_optional, stored_names
from shrinkformer.prune.weight_files import read_tensors, weight_files
from shrinkformer.trust.foreign import shortened
from shrinkformer.trust.weights import FLOATING, StoredTensor, block_of


def correct_dtype(config: PreTrainedConfig, headers: Mapping[str, StoredTensor], folder: Path) -> None:
    """Write the type that most bytes of floating-point tensors have into a configuration.

    Args:
        config: Changed in place.
        headers: Of the weight files.
        folder: For messages.

    Warns:
        ShrinkformerWarning: There are several types; whatever is made from the checkpoint will have one.
    """
    floating = {name: tensor for name, tensor in headers.items() if tensor.is_number and not is_optional(name)}
    sizes = Counter[str]()
    for tensor in floating.values():
        sizes[tensor.dtype] += tensor.bytes
    if not sizes:
        return
    most = sizes.most_common(1)[0][0]
    config.dtype = FLOATING[most]
    others = [name for name, tensor in floating.items() if tensor.dtype != most]
    if others and getattr(config, "quantization_config", None) is None:
        first = others[0]
        warn(
            f"{folder}: {len(others)} of {len(floating)} tensors, such as {shortened(first)}, are "
            f"{_in_words(floating[first].dtype)}, the others {_in_words(most)}; what is made from them is "
            f"{_in_words(most)} throughout"
        )


def _in_words(stored: str) -> str:
    return str(FLOATING[stored]).removeprefix("torch.")


def correct_tying(config: PreTrainedConfig, model: PreTrainedModel, stored: Mapping[str, str], folder: Path) -> None:
    """Untie, in a configuration, embeddings from a head that is in the files and is another matrix.

    Args:
        config: Changed in place.
        model: What it describes, without weights.
        stored: Name in the files by name in the model.
        folder: Of the files.
    """
    tied = dict(model.all_tied_weights_keys)
    if not tied or not all(ours in stored for ours in tied):
        return  # transformers unties by itself where only some weights are there twice
    pairs = [(stored[ours], stored[theirs]) for ours, theirs in tied.items() if theirs in stored]
    files = weight_files(folder)
    for pair in pairs:
        found: dict[str, Tensor] = {}
        for file in {files[name] for name in pair}:  # once each: old files are read as a whole
            found |= read_tensors(file, [name for name in pair if files[name] == file])
        if not torch.equal(found[pair[0]], found[pair[1]]):
            config.tie_word_embeddings = False


def correct_class(
    config: PreTrainedConfig, headers: Mapping[str, StoredTensor], record: Architecture, file: Path
) -> None:
    """Find the class of a model whose configuration names none that transformers has, by what is around its blocks.

    Args:
        config: Changed in place where one class fits the files and no other.
        headers: Of the weight files.
        record: Of the family.
        file: With the configuration, for messages.

    Warns:
        ShrinkformerWarning: Several classes fit.
    """
    named = (config.architectures or [""])[0]
    ours = bool(named and getattr(config, "shrinkformer", None))  # we know what we wrote
    if ours or isinstance(getattr(transformers, named or "_", None), type) or not headers:
        return
    around = {name: tensor for name, tensor in headers.items() if block_of(name, record.layers) is None}
    generates = config.model_type in DECODERS or getattr(config, "is_decoder", False)
    kinds = [kind for kind in stock_classes(config) if generates or not kind.can_generate()]
    models = [outline(kind, config) for kind in kinds]
    fitting: list[str] = []
    for strictly in (True, False):
        fitting = fitting or [type(model).__name__ for model in models if _fits(model, around, record, strictly)]
    if len(fitting) == 1:
        config.architectures = fitting
    elif fitting and not named:
        warn(
            f"{file} names no architectures, and the tensors fit {', '.join(fitting)}; add the right one, such as "
            f'"architectures": ["{fitting[0]}"]'
        )


def _fits(model: PreTrainedModel, around: Mapping[str, StoredTensor], record: Architecture, strictly: bool) -> bool:
    """Whether the tensors around the blocks of a model are those of some files; if strictly, with or without pooler."""
    known, has_head = model.state_dict(), model.base_model is not model
    if has_head != any(name.startswith(f"{model.base_model_prefix}.") for name in around):
        return False
    stored = stored_names(model, around)
    tied = dict(model.all_tied_weights_keys)
    wanted = {name for name in known if block_of(name, record.layers) is None and name not in tied}

    def counts(name: str) -> bool:
        return not is_optional(name) or (strictly and "pooler" in name)

    return (
        all(name in stored for name in wanted if counts(name))
        and all(not counts(name) for name in around.keys() - stored.values())
        and all(tuple(known[name].shape) == around[key].shape for name, key in stored.items())
    )


def correct_heads(config: PreTrainedConfig, raw: Mapping[str, Any], record: Architecture, file: Path) -> None:
    """Write sizes of blocks for ``pruned_heads`` of transformers before version 5, which took heads out of the files.

    Args:
        config: Changed in place.
        raw: The configuration as it is written.
        record: Of the family.
        file: For messages.

    Raises:
        CheckpointError: The entry is none of theirs, or says more heads than there are.
    """
    entry = raw.get("pruned_heads")
    if not entry or getattr(config, "shrinkformer", None):
        return
    heads, blocks = int(config.num_attention_heads), int(config.num_hidden_layers)
    gone = _gone(entry, heads, blocks, file)
    if record.attention.queries_attribute or not record.heads_key:
        raise CheckpointError(f"{file}: pruned_heads, which no version of transformers did to a {config.model_type}.")
    neurons = int(getattr(config, record.neurons_key) or 4 * config.hidden_size)  # GPT-2 may leave it out
    size = LayerSize(heads, int(config.hidden_size) // heads, neurons)
    left = [heads - len(gone.get(index, ())) for index in range(blocks)]
    config.per_layer_config = {
        index: {record.heads_key: kept, record.neurons_key: neurons} for index, kept in enumerate(left)
    }
    config.shrinkformer = {
        "format": 1,
        "architecture": record.to_dict(),
        "head_size": size.head_size,
        "layers": [kept_sizes(size) | {"heads": kept} for kept in left],
    }
    del config.pruned_heads


def _gone(entry: Any, heads: int, blocks: int, file: Path) -> dict[int, set[int]]:
    """Heads that are missing, by block."""
    try:
        gone = {int(index): {int(head) for head in some} for index, some in entry.items()}
        right = all(
            index in range(blocks) and some <= set(range(heads)) and len(some) < heads for index, some in gone.items()
        )
    except (AttributeError, TypeError, ValueError):
        right = False
    if not right:
        raise CheckpointError(
            f"{file}: pruned_heads is {shortened(repr(entry))}; for each of {blocks} blocks it may list some of "
            f"{heads} heads that are missing, but not all."
        )
    return gone
