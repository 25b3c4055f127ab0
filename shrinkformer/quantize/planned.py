"""Layers as they will be stored, from shapes alone, so that what no format holds is refused before it is computed."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import InputError
from shrinkformer.prune.budget import CostModel, Counts, layer_sizes
from shrinkformer.prune.sites import block_sites
from shrinkformer.prune.streamed import block_prefix, tied_weights
from shrinkformer.quantize import matmul_nbits
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.formats import FLOAT, FORMATS
from shrinkformer.quantize.layout import Storable
from shrinkformer.quantize.names import ALL_FORMATS, ONNX
from shrinkformer.quantize.outside import outside_layers
from shrinkformer.quantize.scheme import WHOLE_ROW, Scheme

_LEAST_GROUP = 16
"""The smallest group that is suggested."""


@dataclass(frozen=True)
class Planned:
    """A weight that is not there yet.

    Attributes:
        outputs: Rows.
        inputs: Columns.
        scheme: How it will be stored, with the group that fits its columns.
    """

    outputs: int
    inputs: int
    scheme: Scheme


def planned_layers(model: PreTrainedModel, config: QuantizeConfig, kept: Counts | None = None) -> dict[str, Planned]:
    """What will be stored of a model, by full path of the layer.

    Args:
        model: The model; shapes are enough.
        config: What is done to it.
        kept: Heads and neurons of every block, where it is pruned before; by default all of them.
    """
    found, prefix = dict[str, Planned](), block_prefix(model)
    for view in layer_views(model):
        heads = view.heads if kept is None else kept.heads[view.index]
        neurons = view.neurons if kept is None else kept.neurons[view.index]
        found |= _of_block(view, prefix, config, heads, neurons)
    return found | _outside_blocks(model, config)


def _outside_blocks(model: PreTrainedModel, config: QuantizeConfig) -> dict[str, Planned]:
    found: dict[str, Planned] = {}
    for name in (name for kind in config.also for name in outside_layers(model, kind)):
        scheme, weight = config.scheme_of(name), model.get_submodule(name).weight
        if scheme is not None:
            outputs, inputs = (int(size) for size in weight.shape)
            found[name] = Planned(outputs, inputs, scheme.fitting(inputs))
    return found


def _of_block(view: LayerView, prefix: str, config: QuantizeConfig, heads: int, neurons: int) -> dict[str, Planned]:
    attention, feed_forward = view.architecture.attention, view.architecture.feed_forward
    found: dict[str, Planned] = {}
    for path in (path for site in block_sites(view.architecture, config.layers) for path in site.paths):
        linear, name = view.linear(path), f"{prefix}{view.index}.{path}"
        outputs, inputs = linear.out_features, linear.in_features
        if path == attention.output:
            inputs = inputs * heads // view.heads
        elif path == feed_forward.output:
            inputs = inputs * neurons // view.neurons
        elif path in feed_forward.inputs:
            outputs = outputs * neurons // view.neurons
        else:
            outputs = outputs * heads // view.heads
        scheme = config.scheme_of(name)
        if scheme is not None:
            found[name] = Planned(outputs, inputs, scheme.fitting(inputs))
    return found


def require_formats(
    model: PreTrainedModel, config: QuantizeConfig, formats: Sequence[str], budgets: Sequence[CostModel] = ()
) -> None:
    """Check, from shapes alone, that formats hold whatever comes out.

    Args:
        model: The dense model.
        config: What is done to it.
        formats: Names of formats.
        budgets: To which it is pruned before; by default to none. What each block will keep is not known, but what it
            may keep is, and all of that must fit.

    Raises:
        InputError: One of them does not, or there is no such format.
    """
    for format in formats:
        try:
            _require_all(model, config, format, budgets)
        except _GroupsError as error:
            raise InputError(f"{error}; {_remedy(model, config, format, budgets)}.") from None


def _require_all(model: PreTrainedModel, config: QuantizeConfig, format: str, budgets: Sequence[CostModel]) -> None:
    whole = planned_layers(model, config)
    if not budgets or any(costs.budget.mu == 1 for costs in budgets):
        require_format(model, format, whole)
    for costs in budgets:
        if costs.budget.mu < 1:
            _require_names(model, format, whole)
            possible = list(_possible(model, config, costs))
            for name, label, layer in possible:
                _require_layer(model, format, name, layer, label)
            _require_one_scheme(format, {layer.scheme for _, _, layer in possible})


def require_format(model: PreTrainedModel, format: str, weights: Mapping[str, Storable]) -> None:
    """Check that a format holds every weight.

    Args:
        model: The model; shapes are enough.
        format: Name of the format.
        weights: Quantized or planned, by full path of the layer.

    Raises:
        InputError: It does not, or there is no such format.
    """
    if format not in ALL_FORMATS:
        raise InputError(f"--format {format!r}: choose one of {', '.join(ALL_FORMATS)}.")
    _require_names(model, format, weights)
    for name, weight in weights.items():
        _require_layer(model, format, name, weight, name)
    _require_one_scheme(format, {weight.scheme for weight in weights.values()})


def _require_names(model: PreTrainedModel, format: str, names: Collection[str]) -> None:
    """Check that a format can tell the quantized layers of a model from the others, whatever their schemes are."""
    if format != ONNX and names:
        alike = dict.fromkeys(names, Scheme())
        FORMATS[format].config(alike, [name for name in linear_layers(model) if name not in names])


class _GroupsError(InputError):
    """Groups do not fit; another size might."""


def _require_layer(model: PreTrainedModel, format: str, name: str, weight: Storable, label: str) -> None:
    if format == ONNX:
        if not is_embedding(model, name):  # these are written as float32
            matmul_nbits.require(label, weight)
        return
    if format != FLOAT.name and is_transposed(model, name):
        raise InputError(f"{label}: readers of --format {format} know no Conv1D; use --format float or onnx.")
    FORMATS[format].require(label, weight)


def _require_one_scheme(format: str, schemes: set[Scheme]) -> None:
    reason = "" if format == ONNX else FORMATS[format].one_scheme(schemes)
    if not reason or len(schemes) < 2:
        return
    bits, sizes = ({getattr(scheme, name) for scheme in schemes} for name in ("bits", "group_size"))
    if len(bits) > 1:
        raise InputError(
            f"--format {format}: {reason}, got {len(bits)} numbers of bits; use --format compressed-tensors."
        )
    shown = ", ".join(map(str, sorted(sizes)))
    raise _GroupsError(f"--format {format}: {reason}, but widths of the layers give groups of {shown}")


def _remedy(model: PreTrainedModel, config: QuantizeConfig, format: str, budgets: Sequence[CostModel]) -> str:
    """A size of groups with which the format holds everything."""
    size = config.group_size // 2
    while size >= _LEAST_GROUP:
        try:
            _require_all(model, replace(config, group_size=size), format, budgets)
        except InputError:
            size //= 2
        else:
            return f"pass --group_size {size}"
    return f"pass --group_size {WHOLE_ROW}, one scale per output"


def planned_bytes(
    model: PreTrainedModel, format: str, layers: Mapping[str, Storable], parameters: int, dtype: torch.dtype
) -> int:
    """About what weights take in a file.

    Args:
        model: The model; shapes are enough.
        format: Name of the format.
        layers: Quantized or planned, by full path.
        parameters: Of the whole model, before it is quantized.
        dtype: Of scales, and of what is not quantized; files of ONNX hold float32.
    """
    size = 4 if format == ONNX else dtype.itemsize
    if format == FLOAT.name:
        return parameters * size
    tied = {name.removesuffix(".weight") for name in tied_weights(model)}
    packed = {name: layer for name, layer in layers.items() if format != ONNX or not is_embedding(model, name)}
    rest = parameters - sum(layer.outputs * layer.inputs for name, layer in packed.items() if name not in tied)
    codes = sum(layer.scheme.stored_bits(layer.outputs, layer.inputs, 8 * size) for layer in packed.values())
    return codes // 8 + rest * size


def possible_groups(model: PreTrainedModel, config: QuantizeConfig, costs: CostModel) -> set[int]:
    """All sizes of groups that may come out for a budget."""
    if costs.budget.mu == 1:
        return {layer.scheme.group_size for layer in planned_layers(model, config).values()}
    return {layer.scheme.group_size for _, _, layer in _possible(model, config, costs)}


def _possible(model: PreTrainedModel, config: QuantizeConfig, costs: CostModel) -> Iterator[tuple[str, str, Planned]]:
    """Name, text for messages, and plan of each layer, for all numbers of heads and neurons that blocks may keep."""
    limits, prefix, seen = costs.budget, block_prefix(model), set[LayerSize]()
    views = layer_views(model)
    for view, size in zip(views, layer_sizes(views), strict=True):
        if size in seen:
            continue
        seen.add(size)
        heads = costs.head_counts or range(min(limits.min_heads, view.heads), view.heads + 1)
        least = -(-limits.min_neurons // limits.round_to) * limits.round_to
        neurons = range(max(least, limits.round_to), view.neurons + 1, limits.round_to)
        for count in heads:
            for name, layer in _of_block(
                view, prefix, config, count, view.neurons // limits.round_to * limits.round_to
            ).items():
                yield name, f"{name} with {count} of {view.heads} heads", layer
        for count in neurons:
            for name, layer in _of_block(view, prefix, config, max(heads), count).items():
                yield name, f"{name} with {count} of {view.neurons} neurons", layer
    for name, layer in _outside_blocks(model, config).items():
        yield name, name, layer


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def is_embedding(model: PreTrainedModel, name: str) -> bool:
    """Whether a layer looks rows up."""
    return isinstance(model.get_submodule(name), nn.Embedding)


def is_transposed(model: PreTrainedModel, name: str) -> bool:
    """Whether a layer stores its weight as ``(inputs, outputs)``."""
    return isinstance(model.get_submodule(name), Conv1D)
