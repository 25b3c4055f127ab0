"""Tensors of files by the names that a model has for them: each is used, left out with a word, or an error."""

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from shrinkformer.errors import CheckpointError, warn
from shrinkformer.prune.outlines import stock_heads
from shrinkformer.trust.foreign import shortened

AGAIN = "download the model again, or save it again where it was made."

OPTIONAL = ("pooler", "position_ids", "inv_freq", "masked_bias", ".attn.bias", ".attention.bias")
"""Parts of names that a checkpoint may lack, or have where a model has no use for them: buffers that the classes of
transformers make themselves, and a pooler, which few heads use."""

_WRAPPED = ("lora_", "base_model.model.", ".base_layer.", "modules_to_save.", "adapter", "prefix_tuning", "ia3_")
"""Parts of names that adapters and their wrappers have."""

_PREFIXES = {"module.": "data parallelism of torch", "_orig_mod.": "torch.compile"}
"""What wrappers put before the names of all tensors."""


def stored_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Stored name by name in the model, for tensors that need no conversion; the rules are those of transformers.

    Args:
        model: It needs no weights.
        keys: Names in files.

    Source: ``convert_and_load_state_dict_in_model`` in ``transformers/core_model_loading.py``, which has no public part
    that says where a weight comes from.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    context = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": known}
    found = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, **context)
        if name not in known and key in known:
            name, converted = rename_source_key(key, [], [], **context)
        if name in known and converted is None:
            found[name] = key
    return found


def require_all(model: PreTrainedModel, missing: Iterable[str], where: str) -> None:
    """Check that no weight was made up, of which transformers only warns.

    Args:
        model: What was built.
        missing: Names of weights of a model that are in no file.
        where: Begins the message.

    Raises:
        CheckpointError: One was.
    """
    lacking = sorted(name for name in missing if not is_optional(name))
    if not lacking:
        return
    remedy = AGAIN
    if set(lacking) <= set(type(model)._tied_weights_keys or ()):
        remedy = 'if the embeddings serve as the head, say so there: "tie_word_embeddings": true.'
    raise CheckpointError(f"{where}the weight files lack {_counted(lacking)}, which config.json describes; {remedy}")


def require_stored(model: PreTrainedModel, keys: Iterable[str], where: str) -> None:
    """Check that files hold all weights of a model, as :func:`require_all` does once they are loaded.

    Args:
        model: It needs no weights.
        keys: Names in the files.
        where: Begins the message.

    Raises:
        CheckpointError: They lack one that is not tied to another.
    """
    if any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model)):
        return  # names say nothing of what is put together from several tensors; loading tells
    stored, tied = stored_names(model, keys).keys(), dict(model.all_tied_weights_keys)
    shared = {name for pair in tied.items() if stored & set(pair) for name in pair}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = {name for name, _ in model.named_parameters()} - stored - shared
    require_all(model, (name for name in missing if not any(each.search(name) for each in ignored)), where)


def require_used(model: PreTrainedModel, unused: Iterable[str], where: str) -> None:
    """Check tensors of files that no part of a model takes.

    Buffers that transformers makes itself, what a class of it ignores on purpose, and a pooler without use pass. A head
    that this family has in transformers is left out with a warning: files often hold that of an earlier training.
    Anything else computes something in the model that was saved, and is refused.

    Args:
        model: What is built; it needs no weights.
        unused: Names in files.
        where: Begins messages.

    Raises:
        CheckpointError: The model that was saved is another one.

    Warns:
        ShrinkformerWarning: A head is left out.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    left = [
        name
        for name in sorted(unused)
        if not (
            is_optional(name) or name.rpartition(".")[2] in buffers or any(pattern.search(name) for pattern in ignored)
        )
    ]
    if not left:
        return
    heads = stock_heads(model.config)
    lost = [name for name in left if name.partition(".")[0] not in heads]
    if lost:
        raise CheckpointError(f"{where}{type(model).__name__} has no place for {_counted(lost)}; {_cause_of(lost)}")
    warn(
        f"{where}{type(model).__name__} has no place for the head in the file ({_counted(left)}), which is left out; "
        "if the model needs it, use a class that has it (architectures in config.json)"
    )


def wholes_of(name: str) -> set[str]:
    """A tensor of a quantized file, and all weights that it may be a part of.

    >>> sorted(wholes_of("a.b.qweight"))
    ['a', 'a.b', 'a.b.qweight', 'a.b.weight', 'a.weight']
    """
    steps = name.split(".")
    above = {".".join(steps[:end]) for end in range(1, len(steps))}
    return {name, *above, *(f"{path}.weight" for path in above)}


def is_optional(name: str) -> bool:
    """Whether a tensor may be missing or superfluous, see :data:`OPTIONAL`."""
    return any(part in name for part in OPTIONAL)


def _cause_of(lost: Sequence[str]) -> str:
    for prefix, wrapper in _PREFIXES.items():
        if all(name.startswith(prefix) for name in lost):
            return f"these were saved with {wrapper} around the model; save the model inside ({prefix[:-1]}) instead."
    if any(part in name for part in _WRAPPED for name in lost):
        return "these belong to an adapter; merge it (merge_and_unload() of peft), save the model and pass that folder."
    return (
        "without them another model would be built; use a checkpoint of the plain architecture, or remove these "
        "tensors if the model does not need them."
    )


def _counted(names: list[str]) -> str:
    """The first of some names, and how many others there are."""
    more = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
    return shortened(names[0]) + more
