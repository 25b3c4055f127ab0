"""Save a quantized model so that others can load it, and load quantized and pruned folders again."""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from shrinkformer.architectures import Projection
from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.prune import checkpoint, pruned_modeling
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.shards import ShardWriter
from shrinkformer.quantize.formats import FORMATS
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.layout import Format
from shrinkformer.quantize.onnx_export import export_onnx
from shrinkformer.quantize.reading import read_quantized_state_dict
from shrinkformer.utils.inputs import accepted_inputs

DEFAULT_FORMAT = "compressed-tensors"

ONNX = "onnx"

ALL_FORMATS = (*FORMATS, ONNX)


def save(
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
    directory: str | os.PathLike[str],
    *,
    format: str = DEFAULT_FORMAT,
    dtype: torch.dtype = torch.float16,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    extras_from: Path | None = None,
    example: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a quantized model as a folder that others open; all of it appears, or nothing.

    Args:
        model: The model, with the decoded weights.
        weights: Its integers by path of the layer, from :func:`quantize_`.
        directory: Where to; replaced when it is an earlier checkpoint of this package.
        format: ``compressed-tensors``, ``gptq``, ``float`` (decoded, for any runtime), or ``onnx``.
        dtype: Of the scales and of everything that is not quantized.
        plan: What was kept, if the model was pruned.
        tokenizer: Saved beside the model.
        card: Text of the model card, README.md.
        extras_from: Folder of the dense model; what other libraries need from it (pooling) is copied.
        example: Model inputs to check an ONNX file with.

    Raises:
        InputError: The format cannot hold what was asked for.
        CheckpointError: The folder exists and holds something else.
    """
    require_format(format, weights)
    with checkpoint.replacing(Path(directory)) as folder:
        if format == ONNX:
            if example is None:
                raise InputError("--format onnx is checked on an example: pass example=, a batch of model inputs.")
            export_onnx(model, weights, folder / "model.onnx", accepted_inputs(model, example))
            config = _config(model, None, dtype)
            config.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            (folder / checkpoint.PLAN_FILE).write_text(plan.to_json() if plan is not None else "{}")
            if card is not None:
                (folder / "README.md").write_text(card)
            return Path(directory)
        _write(model, weights, folder, FORMATS[format], dtype)
        _complete(model, folder, plan, tokenizer, card)
        for name in checkpoint.SIDE_FILES:
            if extras_from is not None and (extras_from / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(extras_from / name, folder / name)
    return Path(directory)


def require_format(format: str, weights: Mapping[str, QuantizedWeight]) -> None:
    """Check that a format holds every weight.

    Raises:
        InputError: It does not, or there is no such format.
    """
    if format not in ALL_FORMATS:
        raise InputError(f"--format {format!r}: choose one of {', '.join(ALL_FORMATS)}.")
    if format != ONNX:
        for name, weight in weights.items():
            FORMATS[format].require(name, weight)


def _write(
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
    folder: Path,
    format: Format,
    dtype: torch.dtype,
) -> None:
    """Weights and configuration."""
    writer = ShardWriter(folder)
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    plain = {name: tensor for name, tensor in state.items() if name.removesuffix(".weight") not in weights}
    for name, tensor in revert_weight_conversion(model, plain).items():
        writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    for name, weight in weights.items():
        for stored, tensor in format.tensors(name, weight, dtype).items():
            transposed = stored.endswith(".weight") and _is_transposed(model, name)
            writer.add(stored, tensor.T.contiguous() if transposed else tensor)
    writer.finish()
    schemes = {name: weight.grid.scheme for name, weight in weights.items()}
    section = format.config(schemes, [name for name, _ in _linears(model) if name not in weights])
    _config(model, section, dtype).save_pretrained(folder)
    if section is not None and format.name == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(section, indent=2) + "\n")
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _linears(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def _is_transposed(model: PreTrainedModel, name: str) -> bool:
    linear = Projection.of(model.get_submodule(name))
    return linear is not None and linear.weight is not linear.module.weight


def _config(model: PreTrainedModel, section: Mapping[str, Any] | None, dtype: torch.dtype) -> PreTrainedConfig:
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [checkpoint.stock_class(type(model)).__name__]
    if section is not None:
        config.quantization_config = dict(section)
    return config


def _complete(
    model: PreTrainedModel,
    folder: Path,
    plan: Plan | None,
    tokenizer: PreTrainedTokenizerBase | None,
    card: str | None,
) -> None:
    """What makes the folder load anywhere; a model of stock shape needs no code of ours."""
    if getattr(model.config, "shrinkformer", None):
        checkpoint.complete(folder, type(model), plan=plan, tokenizer=tokenizer, card=card)
        return
    (folder / checkpoint.PLAN_FILE).write_text("{}")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)


def load(directory: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a folder that this package wrote: pruned, quantized, or both.

    Quantized layers compute with what their integers stand for. The packages of the format need not be installed.

    Args:
        directory: The folder.
        **kwargs: Passed to ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Raises:
        CheckpointError: The folder is not there or not a checkpoint of this package.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; pass the folder that a run wrote.")
    section = json.loads((path / "config.json").read_text()).get("quantization_config")
    if section is None:
        return checkpoint.load(path, **kwargs)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    del config.quantization_config
    name = (config.architectures or ["nothing"])[0]
    module = pruned_modeling if getattr(config, "shrinkformer", None) else transformers
    chosen = getattr(module, name, None)
    if chosen is None:
        raise CheckpointError(f"{path}: config.json names {name!r}, which is no model of transformers.")
    dtype = kwargs.pop("dtype", None) or config.dtype or torch.float32
    state = read_quantized_state_dict(path, section, dtype)
    model: PreTrainedModel = chosen.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)
    return model.eval()
