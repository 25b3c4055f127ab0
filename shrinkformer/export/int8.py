"""ONNX files of encoders with 8-bit weights, whose activations onnxruntime rounds to 8 bits while it runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shrinkformer.errors import ShrinkformerError
from shrinkformer.export.onnx_export import of_tokens
from shrinkformer.export.runtime import OnnxModel, require_onnx
from shrinkformer.utils.files import scratch_beside

_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Tells onnxruntime that the graph is optimized, as the exporter leaves it; it would ask for that in a message."""


@dataclass(frozen=True)
class Deviation:
    """How far outputs are from those of the float file, padding left out.

    Attributes:
        cosine: Of the angle between both, all values of an output as one vector.
        relative: Norm of the difference, as a fraction of the norm.
    """

    cosine: float
    relative: float


def quantize_dynamic_int8(source: Path, path: Path, example: Mapping[str, Tensor]) -> dict[str, Deviation]:
    """Write an ONNX file with int8 weights, a scale for each output channel, and measure what that changes.

    Linear layers multiply integers: their inputs are rounded to 8 bits, on a scale of their own for every call. The
    embeddings are stored as int8, too.

    Args:
        source: The float file; its weights are inside.
        path: The new file; whole, or left as it was.
        example: Inputs to compare both files on, as for :func:`~shrinkformer.export.onnx_export.export_onnx`.

    Returns:
        By name of the output.

    Raises:
        InputError: The packages are missing.
        ShrinkformerError: onnxruntime does not take the file, or outputs are not numbers.

    Source:
        onnxruntime, docs/performance/model-optimizations/quantization.md, "Dynamic quantization".
    """
    require_onnx("int8 quantization of ONNX")
    import onnx  # an extra
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # it transposes weights, then trips over their former shapes; it infers them anyway
    model.metadata_props.add(key=_PREPARED[0], value=_PREPARED[1])
    with scratch_beside(path) as scratch:
        written = scratch / path.name
        try:
            quantize_dynamic(model, written, per_channel=True, weight_type=QuantType.QInt8)
        except Exception as error:  # its errors have no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ShrinkformerError(f"{source}: onnxruntime cannot quantize it: {reason}; leave int8 out.") from error
        found = compare(OnnxModel(source), OnnxModel(written), example)
        for name, deviation in found.items():
            if not np.isfinite(deviation.relative):
                raise ShrinkformerError(f"{path}: {name} is not a number with int8 weights; leave int8 out.")
        with written.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    return found


def compare(dense: OnnxModel, quantized: OnnxModel, example: Mapping[str, Tensor]) -> dict[str, Deviation]:
    """How far the outputs of a file are from those of another one."""
    wanted, found = dense(example), quantized(example)
    mask = example.get("attention_mask")
    return {
        name: _deviation(
            of_tokens(torch.from_numpy(found[name]), mask), of_tokens(torch.from_numpy(wanted[name]), mask)
        )
        for name in wanted
    }


def _deviation(found: Tensor, wanted: Tensor) -> Deviation:
    ours, theirs = found.double().flatten(), wanted.double().flatten()
    norm = theirs.norm().clamp(min=1e-30)
    return Deviation(
        cosine=float(ours @ theirs / (ours.norm().clamp(min=1e-30) * norm)),
        relative=float((ours - theirs).norm() / norm),
    )
