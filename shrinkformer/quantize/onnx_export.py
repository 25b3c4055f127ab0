"""Models as ONNX, with quantized layers as ``com.microsoft`` ``MatMulNBits`` nodes, which onnxruntime runs as they are.

Nothing is searched for in the exported graph: while torch traces the model, each quantized layer answers with the node
itself, so a layer cannot be missed, whatever its module looks like, and its float weight never enters the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import Projection
from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.export.onnx_export import require_exportable, require_file, tidy, trace, write_checked
from shrinkformer.export.runtime import require_onnx
from shrinkformer.export.tracing import Traced, TracedDecoder, float_copy, require_tokens
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.matmul_nbits import LAYER, Packed, as_nodes, pack
from shrinkformer.utils.modes import evaluation_mode


def export_onnx(
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
    path: Path,
    example: Mapping[str, Tensor],
    *,
    cache: bool = False,
) -> None:
    """Write a quantized model as ONNX, and see that onnxruntime gives the outputs that torch gives.

    Batch and sequence length are free. The outputs are the tensors of the model's output, by their names there.
    Weights of more than 2 GB go to a file ``<path>.data`` beside ``path``.

    Args:
        model: With the decoded weights in its quantized layers; left as it is. What is not float32 is exported so.
        weights: Codes and grids by the paths of their layers in ``model``.
        path: The file; whole, or left as it was.
        example: Inputs, ``(batch, sequence)`` integers by the names of the model's arguments.
        cache: Take and give keys and values, as :func:`shrinkformer.export.onnx_export.export_onnx` does.

    Raises:
        InputError: The packages are missing, the example is none, or MatMulNBits cannot hold a weight. Nothing has
            been exported then.
        ShrinkformerError: torch cannot export the model, a quantized layer takes no part in it, or the outputs differ.

    Source:
        MatMulNBits: onnxruntime, docs/ContribOperators.md.
    """
    require_onnx("--format onnx")
    require_file(path)
    require_exportable(model)
    tokens = require_tokens(example)
    packed = {name: pack(name, _projection(model, name), weight) for name, weight in weights.items()}
    model = _decoded(model, weights)
    with evaluation_mode(model), torch.no_grad():
        traced = TracedDecoder(model) if cache else Traced(model, tuple(tokens))
        checks = traced.checks(tokens)
        with as_nodes(model, packed):
            program = trace(traced, tokens, list(checks[0][1]))
    _require_nodes(program, packed)
    tidy(program, keep=LAYER)
    write_checked(program, path, checks)


def _projection(model: PreTrainedModel, name: str) -> Projection:
    try:
        projection = Projection.of(model.get_submodule(name))
    except AttributeError:
        projection = None
    if projection is None:
        raise InputError(f"{name}: {type(model).__name__} has no linear layer there; quantize this model.")
    return projection


def _decoded(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> PreTrainedModel:
    """The model in float32; a copy's layers are decoded anew, since a narrower type had to round what codes mean."""
    copied = float_copy(model)
    if copied is not model:
        for name, weight in weights.items():
            _projection(copied, name).weight.data.copy_(weight.decode())
    return copied


def _require_nodes(program: Any, packed: Mapping[str, Packed]) -> None:
    """Check that every quantized layer is a node."""
    found = {node.metadata_props.get(LAYER) for node in program.model.graph if node.op_type == "MatMulNBits"}
    missing = [name for name in packed if name not in found]
    if missing:
        raise ShrinkformerError(
            f"{missing[0]} and {len(missing) - 1} other quantized layers are not in the exported graph: "
            "the model does not use them for this example; quantize only layers that it uses."
        )


def packable(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """Those weights that MatMulNBits holds: of linear layers, with 4 or 8 bits and groups that it knows."""
    found = {}
    for name, weight in weights.items():
        try:
            pack(name, _projection(model, name), weight)
        except InputError:
            continue
        found[name] = weight
    return found
