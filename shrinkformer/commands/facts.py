"""What can be known of a checkpoint without its weights: from its configuration and the headers of its files."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from shrinkformer.architectures import LayerView, find_architecture, layer_views
from shrinkformer.commands.locate import Source, bundled_decoder, bundled_model
from shrinkformer.commands.options import BUNDLED_DECODER, BUNDLED_MODEL
from shrinkformer.efficiency.macs import LayerSize, attention_macs, neuron_macs
from shrinkformer.efficiency.size import count_parameters
from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.prune import pruned_modeling
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.checkpoint import PLAN_FILE, auto_class
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.surgery import kept_sizes
from shrinkformer.quantize.headers import READABLE, StoredTensor, block_of, read_headers, read_quantization

USUAL_LENGTH = 128.0

_MOST_BLOCKS = 1000


def find_checkpoint(name: str) -> Source:
    """A folder, a bundled model, or a name on the hub; only its configuration is read.

    Raises:
        InputError: It is nowhere, or no checkpoint of a family that is known.
    """
    folder = Path(name)
    bundled = {BUNDLED_MODEL: bundled_model, BUNDLED_DECODER: bundled_decoder}.get(name, lambda: None)()
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{name}: there is no config.json; pass a checkpoint folder, or the .jsonl file of a report.")
    location = name if folder.exists() or bundled is None else str(bundled)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # a file of somebody else: every type of error is possible
        where = "its config.json cannot be read" if folder.exists() else "no such folder, not bundled, not on the hub"
        raise InputError(f"{name}: {where} ({_in_one_line(error)}); pass a checkpoint folder.") from None
    try:
        find_architecture(config.model_type)
    except ShrinkformerError as error:
        raise InputError(f"{name}: {error}") from None
    return Source(folder.resolve().name if folder.exists() else name, location, config)


def read_facts(source: Source, sequence_length: float | None) -> dict[str, Any]:
    """Everything that ``shrinkformer inspect`` says, as plain JSON.

    Args:
        source: From :func:`find_checkpoint`.
        sequence_length: At which MACs are counted, in tokens; None for the plan's own, or 128.

    Raises:
        InputError: Files are damaged, or do not fit the configuration.
    """
    folder = _folder(source)
    try:
        tensors = {} if folder is None else read_headers(folder)
        plan = _read_plan(folder)
        model = _build(source, source.config, tensors)
        dense = _build(source, _before_pruning(source.config), {}) if _sizes_differ(source.config) else None
        views = layer_views(model)
        _require_fitting(views, tensors, source)
        quantization = read_quantization(source.config, tensors)
    except ShrinkformerError as error:
        raise InputError(f"{source.location}: {error}") from None
    length = sequence_length or (plan.sequence_length if plan else USUAL_LENGTH)
    layers = _layer_rows(views, tensors, quantization, length)
    kinds: dict[str, int] = {}
    for tensor in tensors.values():
        kinds[tensor.dtype] = kinds.get(tensor.dtype, 0) + tensor.bytes
    files: list[dict[str, Any]] = [{"name": file.name, "bytes": file.stat().st_size} for file in _weight_files(folder)]
    return {
        "name": source.name,
        "location": source.location,
        "model_type": source.config.model_type,
        "architecture": type(model).__name__,
        "written_by": _versions(source.config),
        "hidden_size": views[0].hidden_size,
        "parameters": count_parameters(model),
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "bytes_by_dtype": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "sequence_length": length,
        "macs": sum(row["attention_macs"] + row["ffn_macs"] for row in layers),
        "attention_macs": sum(row["attention_macs"] for row in layers),
        "ffn_macs": sum(row["ffn_macs"] for row in layers),
        "layers": layers,
        "dense": None if dense is None else _dense(dense, length),
        "plan": None if plan is None else _plan(plan),
        "quantization": quantization,
        "loading": loading_lines(source, [file["name"] for file in files]),
    }


def loading_lines(source: Source, files: Sequence[str]) -> list[str]:
    """Two lines of Python that open the model."""
    if files and all(".onnx" in name for name in files):
        path = str(Path(source.location) / next(name for name in files if name.endswith(".onnx")))
        return ["import onnxruntime", f"session = onnxruntime.InferenceSession({path!r})"]
    method = (getattr(source.config, "quantization_config", None) or {}).get("quant_method")
    if source.pruned or method in READABLE:
        return ["import shrinkformer", f"model = shrinkformer.load({source.location!r})"]
    chosen = auto_class((source.config.architectures or [""])[0])
    return [f"from transformers import {chosen}", f"model = {chosen}.from_pretrained({source.location!r})"]


def _folder(source: Source) -> Path | None:
    """Where the files are; None for a model of the hub whose configuration alone is here."""
    if Path(source.location).is_dir():
        return Path(source.location)
    found = transformers.utils.cached_file(
        source.location, SAFE_WEIGHTS_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False
    ) or transformers.utils.cached_file(
        source.location, SAFE_WEIGHTS_INDEX_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found).parent


def _weight_files(folder: Path | None) -> list[Path]:
    """The files that hold weights, in the formats that are there."""
    patterns = ("*.safetensors", "*.onnx", "*.onnx.data", "pytorch_model*.bin")
    return [] if folder is None else [file for pattern in patterns for file in sorted(folder.glob(pattern))]


def _read_plan(folder: Path | None) -> Plan | None:
    file = None if folder is None else folder / PLAN_FILE
    if file is None or not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
        return None if text.strip() == "{}" else Plan.from_json(text)
    except ValueError:  # that it is no plan, or no text
        raise InputError(f"{PLAN_FILE} is no plan; remove it, or prune again.") from None


def _sizes_differ(config: PreTrainedConfig) -> bool:
    return bool((getattr(config, "shrinkformer", None) or {}).get("layers"))


def _before_pruning(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration without sizes per block: what stays are those before pruning."""
    dense = copy.deepcopy(config)
    dense.per_layer_config = None
    dense.shrinkformer = None
    return dense


def _build(source: Source, config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]) -> PreTrainedModel:
    """The model without weights, from classes of transformers and of this package only."""
    most = len(tensors) or _MOST_BLOCKS  # a block has more than one tensor, so this many blocks cannot be
    blocks = getattr(config, "num_hidden_layers", None)
    if not isinstance(blocks, int) or not 0 < blocks <= most:
        raise InputError(f"config.json says {blocks!r} blocks, but the files hold {len(tensors)} tensors; damaged.")
    name = (config.architectures or [""])[0]
    room = pruned_modeling if _sizes_differ(config) else transformers
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"  # another one might be looked for, even on the hub
    try:
        chosen = getattr(room, name, None)
        with torch.device("meta"):
            if isinstance(chosen, type) and issubclass(chosen, PreTrainedModel):
                return chosen(own)
            made: PreTrainedModel = AutoModel.from_config(own, trust_remote_code=False)
            return made
    except Exception as error:  # sizes that fit no model fail anywhere in transformers and torch
        raise InputError(f"config.json describes no {name or config.model_type} ({_in_one_line(error)}).") from None


def _require_fitting(views: Sequence[LayerView], tensors: Mapping[str, StoredTensor], source: Source) -> None:
    """Check that the files hold the blocks that the configuration describes; quantized ones have other shapes."""
    if not tensors:
        return
    record = find_architecture(source.config.model_type)
    found = {index for name in tensors if (index := block_of(name, record.layers)) is not None}
    if found != set(range(len(views))):
        raise InputError(
            f"config.json says {len(views)} blocks, the weight files hold {len(found)}; these are two models."
        )
    for name, tensor in tensors.items():
        index = block_of(name, record.layers)
        for path in (record.attention.output, record.feed_forward.output):
            if index is not None and name.endswith(f"{record.layers}.{index}.{path}.weight"):
                expected = tuple(views[index].linear(path).module.weight.shape)  # type: ignore[arg-type]
                if tensor.shape != expected:
                    raise InputError(
                        f"{name} is {tensor.shape} in the file, {expected} by config.json; these are two models."
                    )


def _layer_rows(
    views: Sequence[LayerView],
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any] | None,
    length: float,
) -> list[dict[str, Any]]:
    path = views[0].architecture.layers
    size: dict[int | None, int] = {}
    for name, tensor in tensors.items():
        size[block_of(name, path)] = size.get(block_of(name, path), 0) + tensor.bytes
    bits = [(row["layer"], row["bits"]) for row in (quantization or {}).get("layers", ())]
    hidden = views[0].hidden_size
    return [
        {
            "layer": index,
            **kept_sizes(layer),
            "queries": layer.queries,
            "attention_macs": round(attention_macs(length, hidden, layer)),
            "ffn_macs": round(layer.neurons * neuron_macs(length, hidden, layer.gated)),
            "bytes": size.get(index),
            "bits": sorted({value for block, value in bits if block == index}),
        }
        for index, layer in enumerate(layer_sizes(views))
    ]


def _dense(model: PreTrainedModel, length: float) -> dict[str, Any]:
    views = layer_views(model)
    sizes: Sequence[LayerSize] = layer_sizes(views)
    return {
        "parameters": count_parameters(model),
        "macs": sum(row["attention_macs"] + row["ffn_macs"] for row in _layer_rows(views, {}, None, length)),
        "layers": [kept_sizes(size) for size in sizes],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    names = ("method", "mu", "seed", "budget", "sequence_length", "dense_macs", "macs", "ratio")
    errors = [{"attention_error": layer.attention_error, "ffn_error": layer.ffn_error} for layer in plan.layers]
    return {**{name: getattr(plan, name) for name in names}, "held_out_divergence": plan.divergences, "layers": errors}


def _versions(config: PreTrainedConfig) -> dict[str, str]:
    section = getattr(config, "shrinkformer", None)
    versions = section.get("versions") if isinstance(section, dict) else None
    return {str(name): str(value) for name, value in versions.items()} if isinstance(versions, dict) else {}


def _in_one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
