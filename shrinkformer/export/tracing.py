"""Models as functions from tensors to tensors, as torch's ONNX exporter traces them."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from shrinkformer.architectures import ENCODERS, layer_views
from shrinkformer.errors import InputError

Inputs = dict[str, Tensor]

Axes = dict[int, Any]
"""Free axes of a tensor: a name, or torch's ``Dim``, which is what an axis has in common with others."""

_KINDS = ("key", "value")

_TOKENS: Axes = {0: "batch_size", 1: "sequence_length"}

_ROWS, _LENGTH, _PAST = 2, 8, 5
"""Sizes that a model is traced with; unlike each other, so that no axis is taken for another."""


class Traced(nn.Module):
    """A model with a plain list of inputs and of outputs, and without a cache.

    Attributes:
        names: Of the inputs, in their order.
    """

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        cached = "use_cache" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"return_dict": True} | ({"use_cache": False} if cached else {})
        self.eval()

    def named(self, inputs: Mapping[str, Tensor]) -> Inputs:
        """Every output that is a tensor, by its name in the model's output."""
        outputs = self.model(**inputs, **self.options)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The same by position."""
        return tuple(self.named(self._plainer(dict(zip(self.names, values, strict=True)))).values())

    def _plainer(self, inputs: Inputs) -> Inputs:
        """Inputs with the mask as what is added to scores, in the few nodes that optimizers look for.

        transformers takes such a mask as it is; from one of tokens it makes a dozen nodes, in which onnxruntime's
        optimizer does not recognize attention. Heads that were narrowed stay unrecognized: its node for attention would
        scale scores by their new width.
        """
        if "attention_mask" not in inputs or not has_plain_heads(self.model):
            return inputs
        open_ = inputs["attention_mask"].unsqueeze(1).unsqueeze(2).to(torch.float32)
        return {**inputs, "attention_mask": (1.0 - open_) * torch.finfo(torch.float32).min}

    def example(self, given: Mapping[str, Tensor]) -> Inputs:
        """Inputs to trace with."""
        return {name: given[name].repeat(_ROWS, _LENGTH)[:_ROWS, :_LENGTH] for name in self.names}

    def axes(self) -> dict[str, Axes]:
        """The free axes of every input; all have the same."""
        axes = {axis: torch.export.Dim(name) for axis, name in _TOKENS.items()}
        return dict.fromkeys(self.names, axes)

    def checks(self, given: Mapping[str, Tensor]) -> list[tuple[Inputs, Inputs]]:
        """Inputs and the model's outputs: of the example, of another shape, and with padding."""
        batches = [{name: given[name] for name in self.names}, _shorter(given)]
        if "attention_mask" in self.names and bool(given["attention_mask"].all()):
            batches.append({**batches[0], "attention_mask": _padded_on_the_right(given["attention_mask"])})
        return [(inputs, self.named(inputs)) for inputs in batches]


class TracedDecoder(Traced):
    """A language model with a cache: keys and values of earlier tokens come in, those of all tokens go out.

    Names are those of Optimum, without ``position_ids``: positions are counted along the mask, in the graph. So padding
    on the left, where batches of prompts have it, needs nothing from the caller.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, ("input_ids", "attention_mask"))
        self.counts = "position_ids" in inspect.signature(model.forward).parameters
        ids = torch.zeros(1, 1, dtype=torch.int64)
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        # A pruned model has its own number and width of heads in every block.
        self.shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]
        past = [f"past_key_values.{index}.{kind}" for index in range(len(self.shapes)) for kind in _KINDS]
        self.names = (*self.names, *past)

    def named(self, inputs: Mapping[str, Tensor]) -> Inputs:
        """Logits, and the cache as ``present.<block>.key`` and ``.value``, ``(batch, heads, all tokens, width)``."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        pairs = [[inputs[f"past_key_values.{i}.{kind}"] for kind in _KINDS] for i in range(len(self.shapes))]
        cache = DynamicCache([tuple(pair) for pair in pairs])
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "return_dict": True}
        if self.counts:
            options["position_ids"] = positions(mask)[:, mask.shape[1] - ids.shape[1] :]
        found = {"logits": self.model(input_ids=ids, attention_mask=mask, **options).logits}
        for index, layer in enumerate(cache.layers):
            found |= {f"present.{index}.key": layer.keys, f"present.{index}.value": layer.values}
        return found

    def example(self, given: Mapping[str, Tensor]) -> Inputs:
        """Some tokens behind a cache of others."""
        tokens = {"input_ids": given["input_ids"].repeat(_ROWS, _LENGTH)[:_ROWS, :_LENGTH]}
        tokens["attention_mask"] = torch.ones(_ROWS, _PAST + _LENGTH, dtype=torch.int64)
        return tokens | self.empty_cache(_ROWS, _PAST)

    def empty_cache(self, rows: int, length: int = 0) -> Inputs:
        """Zeros for the cached keys and values of so many tokens."""
        found = {}
        for index, (heads, key, value) in enumerate(self.shapes):
            for kind, width in zip(_KINDS, (key, value), strict=True):
                found[f"past_key_values.{index}.{kind}"] = torch.zeros(rows, heads, length, width)
        return found

    def axes(self) -> dict[str, Axes]:
        """Names of the free axes of every input; the mask covers cached tokens and new ones."""
        cached = {0: "batch_size", 2: "past_sequence_length"}
        tokens = {"input_ids": _TOKENS, "attention_mask": {0: "batch_size", 1: "total_sequence_length"}}
        return {name: tokens.get(name, cached) for name in self.names}

    def checks(self, given: Mapping[str, Tensor]) -> list[tuple[Inputs, Inputs]]:
        """A batch with padding on the left and a single row, each at once and as one token behind a cache.

        The logits that they should give are those of a pass without a cache.
        """
        found = []
        ids = given["input_ids"]
        for tokens in (ids, ids[:1, : max(2, ids.shape[1] // 2)]):
            mask = torch.ones_like(tokens)
            mask[1:, : tokens.shape[1] // 3] = 0
            whole = {"input_ids": tokens, "attention_mask": mask} | self.empty_cache(len(tokens))
            counted = {"position_ids": positions(mask)} if self.counts else {}
            plain = self.model(input_ids=tokens, attention_mask=mask, use_cache=False, **counted)
            outputs = self.named(whole) | {"logits": plain.logits}
            found.append((whole, outputs))
            if tokens.shape[1] < 2:
                continue
            past = {
                name.replace("present", "past_key_values"): value[:, :, :-1]
                for name, value in outputs.items()
                if name != "logits"
            }
            step = {"input_ids": tokens[:, -1:], "attention_mask": mask} | past
            found.append((step, outputs | {"logits": outputs["logits"][:, -1:]}))
        return found


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention as products and softmax, which runtimes know.

    Of torch's fused attention the exporter makes more nodes than that, such as a test of all scores for NaN: 6 % of the
    time of a MiniLM in onnxruntime.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def has_plain_heads(model: PreTrainedModel) -> bool:
    """Whether a model is an encoder whose heads are all as wide as they were."""
    if model.config.model_type not in ENCODERS:
        return False
    return all(view.head_size == view.query_width == view.value_width for view in layer_views(model))


def positions(mask: Tensor) -> Tensor:
    """Positions of tokens among those that the mask ``(batch, tokens)`` leaves; 0 for padding on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def has_cache(model: PreTrainedModel) -> bool:
    """Whether a model generates with cached keys and values."""
    return bool(model.can_generate()) and "past_key_values" in inspect.signature(model.forward).parameters


def float_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself if it is in float32 on the CPU and names its outputs, else a copy that does."""
    plain = all(value.device.type == "cpu" and value.dtype == torch.float32 for value in model.parameters())
    if plain and getattr(model.config, "return_dict", True):
        return model
    copied: Any = copy.deepcopy(model)
    copied.config.return_dict = True
    moved: PreTrainedModel = copied.to("cpu", torch.float32)
    return moved


def require_tokens(example: Mapping[str, Tensor]) -> Inputs:
    """An example on the CPU, if it is one.

    Raises:
        InputError: Its tensors are not of one shape (batch, sequence), or are empty.
    """
    shapes = {tuple(value.shape) for value in example.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or not all(shape):
        found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in example.items()) or "nothing"
        raise InputError(f"the example for the export has {found}; give tokens of one shape (batch, sequence).")
    return {name: value.cpu() for name, value in example.items()}


def _shorter(example: Mapping[str, Tensor]) -> Inputs:
    """One row and half of the tokens, none of them padding: a shape unlike that of the example."""
    half = {name: value[:1, : max(1, value.shape[1] // 2)] for name, value in example.items()}
    return {name: torch.ones_like(value) if name == "attention_mask" else value for name, value in half.items()}


def _padded_on_the_right(mask: Tensor) -> Tensor:
    padded = mask.clone()
    padded[-1, -(mask.shape[1] // 3) or mask.shape[1] :] = 0
    return padded
