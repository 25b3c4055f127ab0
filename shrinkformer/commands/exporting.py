"""What commands do to write ONNX files beside a checkpoint and to time them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.commands.checkpoint_options import ONNX_FILE
from shrinkformer.commands.onnx_card import onnx_section, without_onnx_section
from shrinkformer.commands.session import Session
from shrinkformer.efficiency.latency import compare_latency, shape_name
from shrinkformer.export.int8 import Deviation
from shrinkformer.export.onnx_export import export_onnx
from shrinkformer.export.runtime import OnnxModel
from shrinkformer.export.tracing import has_cache
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.onnx_export import export_onnx as export_quantized
from shrinkformer.utils.files import write_atomically
from shrinkformer.utils.inputs import accepted_inputs

ONNXRUNTIME = "onnxruntime"
"""Name of the runtime in reports."""

_LONGEST = 64
"""Tokens of an example that a file is checked on; it holds for any number."""


def write_onnx(
    model: PreTrainedModel,
    folder: Path,
    example: Mapping[str, Tensor],
    *,
    weights: Mapping[str, QuantizedWeight] | None = None,
) -> Path:
    """Export a model to where others look for it in its folder.

    Args:
        model: As it is in the folder.
        folder: Of the checkpoint.
        example: Some inputs of the model.
        weights: Integers of its quantized layers.

    Returns:
        Path of the file.

    Raises:
        ShrinkformerError: It cannot be exported.
    """
    path = folder / ONNX_FILE
    if weights:
        export_quantized(model, weights, path, accepted_inputs(model, shortened(example)), cache=has_cache(model))
    else:
        export_onnx(model, path, shortened(example))
    return path


def shortened(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A few rows and tokens of a batch."""
    return {name: value[:3, :_LONGEST].clone() for name, value in example.items()}


def describe_onnx(folder: Path, model: PreTrainedModel, int8: Mapping[str, Deviation] | None = None) -> None:
    """Say in a model card how its ONNX file is run, in place of what it said about an earlier one.

    Args:
        folder: Of the checkpoint.
        model: The model.
        int8: How far the outputs of a file with 8-bit weights are from the others, if there is one.
    """
    card = folder / "README.md"
    section = onnx_section(
        model.config, cached=has_cache(model), tokenizer=(folder / "tokenizer.json").is_file(), int8=int8 or {}
    )
    before, _ = without_onnx_section(card.read_text(encoding="utf-8") if card.is_file() else "")
    write_atomically(card, f"{before}\n\n{section}" if before else section)


def time_onnx(session: Session, path: Path) -> dict[str, dict[str, float]]:
    """Median milliseconds of the dense and of the pruned model in onnxruntime by shape; nothing for models on a GPU.

    They take turns with each other but not with models in torch, whose threads spin for a while when it is done.

    Args:
        session: With the dense model.
        path: Of the pruned model's file.
    """
    job = session.job
    if torch.device(job.device).type != "cpu":
        return {}
    models = {"dense": _dense_onnx(session), "pruned": OnnxModel(path)}
    found = compare_latency(models, job.shapes, vocabulary_size=job.source.config.vocab_size)
    return {name: {shape_name(shape): time.median for shape, time in times.items()} for name, times in found.items()}


def _dense_onnx(session: Session) -> OnnxModel:
    """The dense model in onnxruntime; exported once for all budgets, and kept in memory only."""
    if session.dense_onnx is None:
        with tempfile.TemporaryDirectory(prefix="shrinkformer-") as scratch:
            path = Path(scratch) / "model.onnx"
            export_onnx(session.model, path, shortened(session.job.example))
            session.dense_onnx = OnnxModel(path)
    return session.dense_onnx
