"""The transformer inside what others put around it."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Pipeline, PreTrainedModel

from shrinkformer.errors import InputError


@dataclass(frozen=True)
class Inside:
    """What was found in a wrapper.

    Attributes:
        model: The transformer with its head; changing it in place changes what the wrapper computes.
        tokenizer: That the wrapper brings, or None.
        wrapper: The ``SentenceTransformer`` or ``CrossEncoder`` around it, which knows what is made of its outputs;
            None where there was none.
    """

    model: PreTrainedModel
    tokenizer: Any = None
    wrapper: Any = None


def unwrap(model: Any) -> Inside:
    """Find the transformer that is meant.

    Args:
        model: A model of transformers as it is, or in a ``SentenceTransformer``, ``CrossEncoder``, pipeline,
            ``DataParallel``, ``DistributedDataParallel`` or compiled by ``torch.compile``.

    Raises:
        InputError: There is none, several, or one whose weights are not its own (adapters, shards); it says what to
            pass.
    """
    inner, tokenizer, wrapper = model, None, None
    while not isinstance(inner, PreTrainedModel) or _is_peft(inner):
        if _is_peft(inner):
            raise InputError(
                f"the model is a {type(inner).__name__}, whose adapters are not merged into its weights; pass "
                "model.merge_and_unload()."
            )
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(inner, Pipeline):
            inner, tokenizer = inner.model, inner.tokenizer
        elif _is_from(inner, "sentence_transformers"):
            tokenizer, wrapper = getattr(inner, "tokenizer", None), inner
            inner = _only_transformer(inner)
        else:
            raise InputError(_no_transformer(inner))
    _require_own_weights(inner)
    return Inside(inner, tokenizer, wrapper)


def _is_from(value: Any, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(value).__mro__)


def _is_peft(value: Any) -> bool:
    return hasattr(value, "merge_and_unload") and hasattr(value, "peft_config")


def _only_transformer(wrapper: nn.Module) -> PreTrainedModel:
    found = _transformers_in(wrapper)
    if len(found) != 1:
        shown = ", ".join(found) or "none"
        raise InputError(
            f"the model is a {type(wrapper).__name__} with {len(found)} transformers inside ({shown}); pass one of "
            "them that transformers made."
        )
    return next(iter(found.values()))


def _transformers_in(module: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost models of transformers by their paths."""
    found: dict[str, PreTrainedModel] = {}
    for path, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = part
    return found


def _no_transformer(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, str):
        return f"the model is a text, {value!r}; pass a model, such as AutoModel.from_pretrained({value!r})."
    inside = ", ".join(_transformers_in(value)) if isinstance(value, nn.Module) else ""
    if inside:
        return f"the model is a {kind}, which is none of transformers; pass the one inside: {inside}."
    return f"the model is a {kind}, which is none of transformers; pass what from_pretrained of an Auto class returns."


def _require_own_weights(model: PreTrainedModel) -> None:
    """Check that no layer computes with more than its weight, and that its weight is all here."""
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") or (hasattr(module, "base_layer") and hasattr(module, "merge")):
            raise InputError(
                f"{path} is a {type(module).__name__}, an adapter that is not merged into its weight; merge the "
                "adapters first (merge_and_unload of peft), or unload them."
            )
        if type(module).__name__.startswith(("FSDP", "FullyShardedDataParallel")):
            raise InputError(f"{path or type(model).__name__} is sharded by FSDP; gather the model in one process.")
