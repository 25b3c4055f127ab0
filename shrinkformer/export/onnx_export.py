"""Models as ONNX files that onnxruntime runs, and that give the outputs that torch gives."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures.heads import chooses
from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.export.runtime import OnnxModel, require_onnx
from shrinkformer.export.tracing import (
    Inputs,
    Traced,
    TracedDecoder,
    float_copy,
    has_cache,
    plain_attention,
    require_tokens,
)
from shrinkformer.utils.files import scratch_beside
from shrinkformer.utils.inputs import accepted_inputs
from shrinkformer.utils.modes import evaluation_mode

TOLERANCE = 1e-4
"""Of onnxruntime's outputs, relative to the largest output of the model."""

_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary positions that look at the length of an input."""

_INLINE_LIMIT = 2_000_000_000
"""Bytes of weights in the ``.onnx`` file itself; protobuf allows no more than 2^31 for everything."""


def export_onnx(
    model: PreTrainedModel, path: str | os.PathLike[str], example: Mapping[str, Tensor], *, cache: bool | None = None
) -> None:
    """Write a model as ONNX, and see that onnxruntime gives the outputs that torch gives.

    Batch and sequence length are free. The outputs are the tensors of the model's output, by their names there. A
    language model takes and gives its cache, as ``past_key_values.<block>.key`` and ``.value`` of ``(batch, heads,
    cached tokens, width)`` and ``present.<block>.key`` and ``.value``. Weights of more than 2 GB go to a file
    ``<path>.data`` beside ``path``.

    Args:
        model: Left as it is. What is not float32 is exported so.
        path: The file; whole, or left as it was.
        example: Inputs, ``(batch, sequence)`` integers by the names of the model's arguments; others are left out.
        cache: Export the cache; by default where the model generates with one.

    Raises:
        InputError: The packages are missing, the example is none, or no graph holds the model. Nothing has been
            exported then.
        ShrinkformerError: torch cannot export the model, or the outputs differ.
    """
    require_onnx("the ONNX export")
    path = Path(path)
    require_file(path)
    require_exportable(model)
    tokens = require_tokens(accepted_inputs(model, example))
    model = float_copy(model)
    with evaluation_mode(model), torch.no_grad():
        cached = has_cache(model) if cache is None else cache
        traced = TracedDecoder(model) if cached else Traced(model, tuple(tokens))
        checks = traced.checks(tokens)
        program = trace(traced, tokens, list(checks[0][1]))
    tidy(program)
    spell_out(program)
    write_checked(program, path, checks)


def require_exportable(model: PreTrainedModel) -> None:
    """Check, from modules alone, that a graph can hold what a model computes.

    Raises:
        InputError: It cannot.
    """
    if chooses(model):
        raise InputError(
            f"{type(model).__name__} answers by choosing, and inputs of (examples, choices, length) are not exported "
            "as ONNX; leave the export out."
        )
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind in _LENGTH_DEPENDENT:
            raise InputError(
                f"{type(model).__name__} has rope_type {kind!r}, whose frequencies follow the length of each input; "
                "an ONNX graph has one set of them: run it in torch, or export a checkpoint with rope_type default, "
                "linear, yarn or llama3."
            )


def require_file(path: Path) -> None:
    """Check that a path may be that of a file.

    Raises:
        InputError: It is a folder.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the path of a file, such as {path / 'model.onnx'}.")


def trace(traced: Traced, example: Mapping[str, Tensor], outputs: Sequence[str]) -> Any:
    """The ``ONNXProgram`` of a model.

    Args:
        traced: The model.
        example: Inputs, as for :func:`export_onnx`.
        outputs: Names of the outputs.

    Raises:
        ShrinkformerError: torch cannot export the model.
    """
    inputs, axes = traced.example(example), traced.axes()
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of torchvision, which is not used
    try:
        with warnings.catch_warnings(), plain_attention(traced.model):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=(tuple(axes[name] for name in inputs),),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ShrinkformerError(
            f"torch {torch.__version__} cannot export {type(traced.model).__name__} as ONNX: {reason}; run it in torch."
        ) from error
    finally:
        log.setLevel(level)
    return program


def tidy(program: Any, *, keep: str = "") -> None:
    """Remove what torch noted about nodes (lines of source, folders), but for one key of their metadata."""
    for node in program.model.graph.all_nodes():
        kept = {key: value for key, value in node.metadata_props.items() if key == keep}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
    for value in list(program.model.graph.initializers.values()):
        value.name = value.name.removeprefix("model.")  # the name of the model in `Traced`


def spell_out(program: Any) -> None:
    """Write what the exporter folds as optimizers look for it, so that onnxruntime's finds the attention of encoders.

    That is the mask axis by axis, scores divided (a product would be taken for the mask's), and the number of heads in
    shapes. Nothing else is computed. Graphs whose mask is another one stay as they are, see ``Traced``.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass  # comes with torch's exporter

    graph, mask = program.model.graph, None
    for node in list(graph):
        if (
            node.op_type == "Unsqueeze"
            and node.inputs[0].name == "attention_mask"
            and _numbers(node.inputs[1]) == [1, 2]
        ):
            mask = _inserted(graph, "Unsqueeze", [node.inputs[0], _constant(graph, "axis_1", np.int64(1))], node)
            node.replace_input_with(0, mask)
            node.replace_input_with(1, _constant(graph, "axis_2", np.int64(2)))
    named: dict[tuple[str, int], Any] = {}
    for node in list(graph) if mask is not None else ():
        if node.op_type == "Reshape":
            _name_heads(graph, node, named)
        elif node.op_type == "Softmax" and (added := node.inputs[0].producer()) is not None:
            _divide_scores(graph, added)
    RemoveUnusedNodesPass()(program.model)


def _name_heads(graph: Any, reshape: Any, named: dict[tuple[str, int], Any]) -> None:
    shape, made = reshape.inputs[1].producer(), reshape.outputs[0].shape
    if shape is None or shape.op_type != "Concat" or len(shape.inputs) != 4 or made is None:
        return
    batch, tokens, heads, width = shape.inputs
    if _numbers(heads) == [-1] and isinstance(made[2], int):
        key = (shape.outputs[0].name, made[2])  # blocks with other numbers of heads share one shape
        if key not in named:
            number = _constant(graph, f"{key[0]}_heads_{key[1]}", np.int64(made[2]))
            named[key] = _inserted(graph, "Concat", [batch, tokens, number, width], reshape, axis=0)
        reshape.replace_input_with(1, named[key])


def _divide_scores(graph: Any, added: Any) -> None:
    scaled = added.inputs[0].producer() if added.op_type == "Add" else None
    if scaled is None or scaled.op_type != "Mul" or len(factor := _numbers(scaled.inputs[1])) != 1:
        return
    divisor = _constant(graph, f"{scaled.outputs[0].name}_divisor", np.float32(1 / factor[0]))
    added.replace_input_with(0, _inserted(graph, "Div", [scaled.inputs[0], divisor], added))


def _numbers(value: Any) -> list[float]:
    """What a constant holds; nothing where it is none."""
    return [] if value is None or value.const_value is None else list(value.const_value.numpy().flatten().tolist())


def _constant(graph: Any, name: str, number: np.int64 | np.float32) -> Any:
    """A new constant: a list of one whole number, or a scalar."""
    import onnx_ir  # comes with torch's exporter

    content = np.array([number]) if isinstance(number, np.int64) else np.array(number)
    tensor = onnx_ir.tensor(content, name=name)
    value = onnx_ir.Value(
        name=name, const_value=tensor, shape=onnx_ir.Shape(content.shape), type=onnx_ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def _inserted(graph: Any, kind: str, inputs: Sequence[Any], before: Any, **attributes: int) -> Any:
    """The output of a new node."""
    import onnx_ir  # comes with torch's exporter

    node = onnx_ir.node(kind, inputs, attributes)
    node.outputs[0].name = f"{before.outputs[0].name}_{kind.lower()}"
    graph.insert_before(before, node)
    return node.outputs[0]


def write_checked(program: Any, path: Path, checks: Sequence[tuple[Inputs, Inputs]]) -> None:
    """Write a program to a file that appears when onnxruntime gives the outputs that it should.

    Args:
        program: An ``ONNXProgram``.
        path: The file; more than 2 GB of weights go to ``<path>.data``.
        checks: Pairs of inputs and outputs by name.

    Raises:
        ShrinkformerError: Outputs differ; nothing was written.
    """
    with scratch_beside(path) as folder:
        _save(program, folder / path.name)
        check_outputs(folder / path.name, checks)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the model after its data
            os.replace(file, path.parent / file.name)


def _save(program: Any, path: Path) -> None:
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(path, external_data=size > _INLINE_LIMIT)
    for file in path.parent.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def check_outputs(path: Path, checks: Sequence[tuple[Inputs, Inputs]]) -> None:
    """Compare onnxruntime's outputs with those that they should be.

    Raises:
        ShrinkformerError: They differ by more than :data:`TOLERANCE`.
    """
    model = OnnxModel(path)
    for inputs, expected in checks:
        found = model(inputs)
        for name, wanted in expected.items():
            error = difference(torch.from_numpy(found[name]), wanted, inputs.get("attention_mask"))
            if not error <= TOLERANCE:  # also where it is not a number
                raise ShrinkformerError(
                    f"{name} of the ONNX file differs from the model's by {error:.1e} of its largest value, for inputs "
                    f"of shape {tuple(next(iter(inputs.values())).shape)}; nothing was written. Please report this."
                )


def difference(found: Tensor, wanted: Tensor, mask: Tensor | None) -> float:
    """Largest difference relative to the largest value; of tokens, where there is one row for each."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = of_tokens(found, mask), of_tokens(wanted, mask)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def of_tokens(output: Tensor, mask: Tensor | None) -> Tensor:
    """What an output says about tokens; padding on the left attends to nothing, and its rows are what that makes.

    Args:
        output: ``(batch, tokens, ...)``, a cache ``(batch, heads, tokens, width)``, or anything else, which stays.
        mask: ``(batch, tokens)``, ones for tokens; a step behind a cache has fewer tokens than the mask.
    """
    if output.ndim == 4:
        output = output.transpose(1, 2)
    if mask is None or output.ndim < 3 or output.shape[0] != mask.shape[0] or output.shape[1] > mask.shape[1]:
        return output
    return output[mask[:, -output.shape[1] :].bool()]
