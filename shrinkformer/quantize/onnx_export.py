"""Models as ONNX, with quantized layers as ``com.microsoft`` ``MatMulNBits`` nodes, which onnxruntime runs as they are.

Nothing is searched for in the exported graph: while torch traces the model, each quantized layer answers with the node
itself, so a layer cannot be missed, whatever its module looks like, and its float weight never enters the file.
"""

import copy
import importlib.util
import inspect
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.architectures import Projection
from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.matmul_nbits import LAYER, Packed, as_nodes, pack
from shrinkformer.utils.modes import evaluation_mode

TOLERANCE = 1e-4
"""Of onnxruntime's outputs, relative to the largest output of the model."""

_INLINE_LIMIT = 2_000_000_000
"""Bytes of weights in the ``.onnx`` file itself; protobuf allows no more than 2^31 for everything."""


def onnx_is_installed() -> bool:
    """Whether everything that the export needs can be imported; it is an extra."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))


def export_onnx(
    model: PreTrainedModel, weights: Mapping[str, QuantizedWeight], path: Path, example: Mapping[str, Tensor]
) -> None:
    """Write a quantized model as ONNX, and see that onnxruntime gives the outputs that torch gives.

    Batch and sequence length are free. The outputs are the tensors of the model's output, by their names there; caches
    are left out. Weights of more than 2 GB go to a file ``<path>.data`` beside ``path``.

    Args:
        model: With the decoded weights in its quantized layers; left as it is. What is not float32 is exported so.
        weights: Codes and grids by the paths of their layers in ``model``.
        path: The file; whole, or left as it was.
        example: Inputs, ``(batch, sequence)`` integers by the names of the model's arguments.

    Raises:
        InputError: The packages are missing, the example is none, or MatMulNBits cannot hold a weight. Nothing has
            been exported then.
        ShrinkformerError: torch cannot export the model, a quantized layer takes no part in it, or the outputs differ.

    Source:
        MatMulNBits: onnxruntime, docs/ContribOperators.md.
    """
    if not onnx_is_installed():
        raise InputError('--format onnx needs onnx, onnxscript and onnxruntime: pip install "shrinkformer[export]".')
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the path of a file, such as {path / 'model.onnx'}.")
    _check_example(example)
    packed = {name: pack(name, _projection(model, name), weight) for name, weight in weights.items()}
    if any(value.device.type != "cpu" or value.dtype != torch.float32 for value in model.parameters()):
        model = _float_copy(model, weights)
    example = {name: value.cpu() for name, value in example.items()}
    traced = _Traced(model, tuple(example))
    with evaluation_mode(model), torch.no_grad():
        checks = [(inputs, traced.named(inputs)) for inputs in (example, _shorter(example))]
        with as_nodes(model, packed):
            program = _export(traced, example, list(checks[0][1]))
    _check_nodes(program, packed)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        _save(program, folder / path.name)
        _check_outputs(folder / path.name, checks)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the model after its data
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _projection(model: PreTrainedModel, name: str) -> Projection:
    try:
        projection = Projection.of(model.get_submodule(name))
    except AttributeError:
        projection = None
    if projection is None:
        raise InputError(f"{name}: {type(model).__name__} has no linear layer there; quantize this model.")
    return projection


def _float_copy(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> PreTrainedModel:
    """A float32 copy; its quantized layers are decoded anew, since a narrower type had to round what codes mean."""
    model = copy.deepcopy(model).to("cpu", torch.float32)
    for name, weight in weights.items():
        _projection(model, name).weight.data.copy_(weight.decode())
    return model


def _check_example(example: Mapping[str, Tensor]) -> None:
    shapes = {tuple(value.shape) for value in example.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or not all(shape):
        found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in example.items()) or "nothing"
        raise InputError(f"the example for the export has {found}; give tokens of one shape (batch, sequence).")


def _shorter(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One row and half of the tokens, none of them padding: a shape unlike that of the example."""
    half = {name: value[:1, : max(1, value.shape[1] // 2)] for name, value in example.items()}
    return {name: torch.ones_like(value) if name == "attention_mask" else value for name, value in half.items()}


class _Traced(nn.Module):
    """A model with a plain list of inputs and of outputs, and without a cache."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        cached = "use_cache" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"return_dict": True} | ({"use_cache": False} if cached else {})
        self.eval()

    def named(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output that is a tensor, by its name in the model's output."""
        outputs = self.model(**inputs, **self.options)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The same by position."""
        return tuple(self.named(dict(zip(self.names, values, strict=True))).values())


def _export(traced: _Traced, example: Mapping[str, Tensor], outputs: list[str]) -> Any:
    """An ``ONNXProgram``. Sizes of the tokens it is traced with are unlike, so that no axis is taken for another."""
    tokens = tuple(value.repeat(2, 8)[:2, :8] for value in example.values())
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of torchvision, which is not used
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced,
                tokens,
                input_names=list(example),
                output_names=outputs,
                dynamic_shapes=(tuple(axes for _ in tokens),),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ShrinkformerError(
            f"torch {torch.__version__} cannot export {type(traced.model).__name__} as ONNX: {reason}; "
            "choose another format."
        ) from error
    finally:
        log.setLevel(level)
    return program


def _check_nodes(program: Any, packed: Mapping[str, Packed]) -> None:
    """Every quantized layer is a node. What torch noted about nodes (lines of source, folders) is removed."""
    found = {node.metadata_props.get(LAYER) for node in program.model.graph if node.op_type == "MatMulNBits"}
    missing = [name for name in packed if name not in found]
    if missing:
        raise ShrinkformerError(
            f"{missing[0]} and {len(missing) - 1} other quantized layers are not in the exported graph: "
            "the model does not use them for this example; quantize only layers that it uses."
        )
    for node in program.model.graph.all_nodes():
        layer = node.metadata_props.get(LAYER)
        node.metadata_props.clear()
        if layer is not None:
            node.metadata_props[LAYER] = layer
    for value in list(program.model.graph.initializers.values()):
        value.name = value.name.removeprefix("model.")  # the name of the model in `_Traced`


def _save(program: Any, path: Path) -> None:
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(path, external_data=size > _INLINE_LIMIT)
    for file in path.parent.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _check_outputs(path: Path, checks: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    """Compare onnxruntime's outputs with the model's, for pairs of inputs and outputs."""
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    used = {value.name for value in session.get_inputs()}  # a model may ignore an input
    for inputs, expected in checks:
        found = session.run(list(expected), {name: value.numpy() for name, value in inputs.items() if name in used})
        for (name, wanted), values in zip(expected.items(), found, strict=True):
            error = _difference(torch.from_numpy(values), wanted, inputs.get("attention_mask"))
            if not error <= TOLERANCE:  # also where it is not a number
                raise ShrinkformerError(
                    f"{name} of the ONNX file differs from the model's by {error:.1e} of its largest value, for inputs "
                    f"of shape {tuple(next(iter(inputs.values())).shape)}; nothing was written. Please report this."
                )


def _difference(found: Tensor, wanted: Tensor, mask: Tensor | None) -> float:
    """Largest difference relative to the largest value; of tokens, where there is one row for each."""
    if found.shape != wanted.shape:
        return float("inf")
    if mask is not None and wanted.ndim == 3 and wanted.shape[:2] == mask.shape:
        # Padding on the left of a decoder attends to nothing, and its rows are what a library makes of that.
        found, wanted = found[mask.bool()], wanted[mask.bool()]
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
