"""Save a quantized model so that others can load it, and load quantized and pruned folders again."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shrinkformer.architectures.wrapped import unwrap
from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.prune import checkpoint
from shrinkformer.prune.opening import load_pretrained, open_config
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pruned_modeling import adopt_config
from shrinkformer.prune.shards import ShardWriter
from shrinkformer.prune.side_files import add_side_files, read_generation_config, save_wrapper
from shrinkformer.prune.streamed import add_tensors, tied_weights
from shrinkformer.quantize.formats import FLOAT, FORMATS
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.layout import Format
from shrinkformer.quantize.names import DEFAULT_FORMAT, ONNX
from shrinkformer.quantize.onnx_export import export_onnx
from shrinkformer.quantize.planned import is_embedding, is_transposed, linear_layers, require_format
from shrinkformer.quantize.reading import read_quantized_state_dict
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.trust.foreign import foreign_errors
from shrinkformer.utils.hub import folder_of
from shrinkformer.utils.inputs import accepted_inputs

_AGAIN = "download the model again, or quantize it again."


def save(
    model: Any,
    weights: Mapping[str, QuantizedWeight],
    directory: str | os.PathLike[str],
    *,
    format: str = DEFAULT_FORMAT,
    dtype: torch.dtype = torch.float16,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    extras_from: str | os.PathLike[str] | None = None,
    sentence_encoder: bool = False,
    example: Mapping[str, Tensor] | None = None,
    tied_once: bool = False,
) -> Path:
    """Write a quantized model as a folder that others open; all of it appears, or nothing.

    Args:
        model: The model, with the decoded weights, or what holds it; see :func:`shrinkformer.save`.
        weights: Its integers by path of the layer, from :func:`quantize_`.
        directory: Where to; replaced when it is an earlier checkpoint of this package.
        format: ``compressed-tensors``, ``gptq``, ``float`` (decoded, for any runtime), or ``onnx``.
        dtype: Of the scales and of everything that is not quantized.
        plan: What was kept, if the model was pruned.
        tokenizer: Saved beside the model.
        card: Text of the model card, README.md.
        extras_from: Folder of the dense model; everything beside its weights that is not written anew is copied.
        sentence_encoder: Write that for mean pooling where the dense model has nothing of the kind; not beside ONNX.
        example: Model inputs to check an ONNX file with.
        tied_once: Write integers of a matrix with two uses under one of its names, which :func:`load` takes and other
            readers do not.

    Raises:
        InputError: The format cannot hold what was asked for, or the model cannot be saved as
            :func:`shrinkformer.save` says.
        CheckpointError: The folder exists and holds something else.
    """
    inside = unwrap(model)
    model, tokenizer = inside.model, tokenizer or inside.tokenizer
    require_format(model, format, weights)
    if format == ONNX and example is None:
        raise InputError("--format onnx is checked on an example: pass example=, a batch of model inputs.")
    if tied_once:
        tied = {name.removesuffix(".weight") for name in tied_weights(model)}
        weights = {name: weight for name, weight in weights.items() if name not in tied}
    with checkpoint.replacing(Path(directory)) as folder:
        save_wrapper(inside, folder)
        if format == ONNX:
            assert example is not None
            linear = {name: weight for name, weight in weights.items() if not is_embedding(model, name)}
            export_onnx(model, linear, folder / "model.onnx", accepted_inputs(model, example))
            own, kind = copy.deepcopy(model.config), FLOAT
        else:
            own, kind = copy.deepcopy(model.config), FORMATS[format]
            _write(model, weights, folder, kind, dtype)
        schemes = {name: weight.grid.scheme for name, weight in weights.items()}
        finish_folder(folder, model, own, kind, schemes, plan=plan, dtype=dtype, card=card)
        mean = sentence_encoder and format != ONNX
        add_side_files(folder, model, source=extras_from, tokenizer=tokenizer, sentence_encoder=mean)
    return Path(directory)


def _write(
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
    folder: Path,
    format: Format,
    dtype: torch.dtype,
) -> None:
    writer = ShardWriter(folder)
    tied = tied_weights(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    add_weights(writer, model, state, weights, format=format, dtype=dtype)
    writer.finish()


def add_weights(
    writer: ShardWriter,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    weights: Mapping[str, QuantizedWeight],
    *,
    format: Format,
    dtype: torch.dtype,
) -> None:
    """Write tensors, with integers in place of the weights that are quantized.

    Args:
        writer: Takes them.
        model: For the kind of its layers and for the names in files; it needs no weights.
        state: All tensors by their names in the model.
        weights: Integers by path of the layer; each of these has its ``.weight`` in ``state``.
        format: Of the integers.
        dtype: Of scales and of everything that is not quantized.
    """
    plain = {name: tensor for name, tensor in state.items() if name.removesuffix(".weight") not in weights}
    add_tensors(writer, model, plain, dtype)
    for name, weight in weights.items():
        for stored, tensor in format.tensors(name, weight, dtype).items():
            transposed = stored.endswith(".weight") and is_transposed(model, name)
            writer.add(stored, tensor.T.contiguous() if transposed else tensor)


def finish_folder(
    folder: Path,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    format: Format,
    schemes: Mapping[str, Scheme],
    *,
    plan: Plan | None,
    dtype: torch.dtype,
    card: str | None = None,
) -> None:
    """Add to weights what makes a folder load anywhere; a model of stock shape needs no code of ours.

    Args:
        folder: With weights.
        model: For its class and the names of its layers; it needs no weights.
        config: To be written.
        format: Of the weights.
        schemes: How each quantized layer is stored.
        plan: What was kept, if the model was pruned.
        dtype: Of scales and of everything that is not quantized.
        card: Text of the model card, README.md.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    section = format.config(schemes, [name for name in linear_layers(model) if name not in schemes])
    if section is not None:
        config.quantization_config = section
        if any(name.removesuffix(".weight") in schemes for name in tied_weights(model)):
            config.tie_word_embeddings = False  # readers tie weights, and there are only integers
        if format.config_file:
            (folder / format.config_file).write_text(json.dumps(section, indent=2) + "\n")
    checkpoint.complete(folder, config, type(model), plan=plan, card=card)


def load(
    directory: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a folder that this package wrote: pruned, quantized, or both.

    Quantized layers compute with what their integers stand for. The packages of the format need not be installed.

    Args:
        directory: The folder, or ``user/name`` of a repository on the hub. No code that comes from there is run.
        revision: Branch, tag or commit on the hub.
        token: For a private repository; by default the one that the user is signed in with.
        **kwargs: Passed to ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Raises:
        CheckpointError: The folder is not there or not a checkpoint of this package, or it is damaged.
        HubError: The hub cannot be reached.
    """
    path = folder_of(directory, revision=revision, token=token)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json; pass the folder that a run wrote, or a name on the hub."
        )
    config = open_config(path)
    section = getattr(config, "quantization_config", None)
    if section is None:
        return checkpoint.load(path, **kwargs)
    chosen: Any = checkpoint.written_class(path, config)
    del config.quantization_config
    dtype = kwargs.pop("dtype", None) or config.dtype or torch.float32
    with foreign_errors(CheckpointError, f"{path}: the quantized weights cannot be read", _AGAIN):
        state = read_quantized_state_dict(path, section, dtype)
    model = load_pretrained(chosen, None, config=config, state_dict=state, dtype=dtype, **kwargs)
    model.name_or_path = model.config.name_or_path = str(path)  # beside which a sentence encoder's modules lie
    adopt_config(model.config)  # and its plan
    read_generation_config(path, model)
    return model.eval()
