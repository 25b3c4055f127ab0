"""Blocks compute what their record counts, and nothing else: looked at before anything is learnt, without weights."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, find_architecture, layer_views, require_alike
from shrinkformer.efficiency.macs import count_matmul_macs, model_macs
from shrinkformer.errors import UnsupportedModelError, warn
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.trust.foreign import reason_of, shortened

_TOKENS = 4
"""Length of the one input that is counted."""


def require_counted(model: PreTrainedModel) -> None:
    """Check that a budget would be one of all that the blocks of a model compute.

    Args:
        model: It needs no weights; those that it has are neither read nor copied.

    Raises:
        UnsupportedModelError: Blocks are of several kinds, hold layers that are in no record, or do other products of
            matrices than are counted.

    Warns:
        ShrinkformerWarning: The model cannot be run without weights, so that products were not counted.
    """
    views = layer_views(model)
    require_alike(model, "prune or quantize")
    strange = [f"layer {view.index}, {name}" for view in views for name in _layers_beside(view)]
    if strange:
        more = f" and {len(strange) - 1} others" if len(strange) > 1 else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers in its blocks that would neither be pruned nor counted: {strange[0]}"
            f"{more}; merge adapters (merge_and_unload() of peft), leave cross-attention out (add_cross_attention), or "
            "take a model of the plain architecture."
        )
    few = list({_shape_of(view): view for view in views}.values())
    expected = model_macs(layer_sizes(few), views[0].hidden_size, _TOKENS)
    try:
        found = _count(model, [view.index for view in few])
    except Exception as error:  # code of any model, which may need whatever
        warn(
            f"{type(model).__name__} cannot be run without weights ({reason_of(error)}), so that the products of "
            "matrices in its blocks were not compared with what is counted"
        )
        return
    if found != expected:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {len(few)} of its blocks do {found:,} multiplications for {_TOKENS} tokens, and "
            f"{expected:,.0f} would be counted; they compute something that the record of their architecture does not "
            "know (docs/architectures.md)."
        )


def _count(model: PreTrainedModel, blocks: list[int]) -> int:
    """Multiplications of some blocks for one short input; without values where that is possible, otherwise of any."""
    base = without_weights(model).base_model
    path = find_architecture(model.config.model_type).layers
    every = base.get_submodule(path)
    base.set_submodule(path, nn.ModuleList(every[index] for index in blocks))
    ids = torch.full((1, _TOKENS), (model.config.pad_token_id or 0) + 1)  # no padding, which some classes warn of
    ids %= model.config.vocab_size
    try:
        return count_matmul_macs(base, {"input_ids": ids.to("meta")})
    except RuntimeError:  # something asks for a value
        base.to_empty(device="cpu")
        for buffer in base.buffers():
            buffer.zero_()
        return count_matmul_macs(base, {"input_ids": ids})


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the meta device; nothing large is copied on the way."""
    empty: dict[int, object] = {
        id(tensor): torch.empty_like(tensor, device="meta", requires_grad=False) for tensor in model.buffers()
    }
    for weight in model.parameters():
        empty[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    return copy.deepcopy(model, empty)


def _shape_of(view: LayerView) -> object:
    """Blocks that are the same but for their values have equal ones."""
    shapes = [(name, weight.shape) for name, weight in view.block.named_parameters()]
    return *map(type, view.block.modules()), *shapes, layer_sizes([view])[0]


def _layers_beside(view: LayerView) -> list[str]:
    """Names of layers in a block that hold matrices and are in no record."""
    record = view.architecture
    known = {*record.attention.producers, record.attention.output, *record.feed_forward.inputs}
    known.add(record.feed_forward.output)
    found = []
    for name, module in view.block.named_modules():
        matrices = [path for path, weight in module.named_parameters(recurse=False) if weight.ndim > 1]
        if matrices and name not in known:
            found.append(shortened(f"{name}.{matrices[0]}"))
    return found
