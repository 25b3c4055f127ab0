"""What can be known of a checkpoint without its weights: from its configuration and the headers of its files."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.commands.locate import Source, bundled_decoder, bundled_model
from shrinkformer.commands.options import BUNDLED_DECODER, BUNDLED_MODEL
from shrinkformer.efficiency.macs import LayerSize, attention_macs, neuron_macs
from shrinkformer.efficiency.size import count_parameters
from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.checkpoint import PLAN_FILE
from shrinkformer.prune.opening import open_config, shapes_of
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pruned_modeling import auto_class
from shrinkformer.prune.sentence_encoder import MODULES
from shrinkformer.prune.surgery import kept_sizes
from shrinkformer.quantize.headers import READABLE, StoredTensor, block_of, read_headers, read_quantization
from shrinkformer.trust.foreign import reason_of
from shrinkformer.trust.json_files import read_object

USUAL_LENGTH = 128.0

_LONGEST_PLAN = 256 * 2**20  # bytes; it lists every neuron that stays


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
        config = open_config(location)
    except ShrinkformerError as error:
        raise InputError(f"{name}: {error}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: no such folder, not bundled, not on the hub ({reason_of(error)}); pass a checkpoint folder."
        ) from None
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
        where = folder or Path(source.location)
        model = shapes_of(source.config, where)
        dense = shapes_of(_before_pruning(source.config), where) if _sizes_differ(source.config) else None
        views = layer_views(model)
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
    """Lines of Python that open the model; of a sentence encoder also those that open it with its pooling."""
    lines = _opening_lines(source, files)
    quantized = getattr(source.config, "quantization_config", None)
    if quantized or "onnx" in lines[0] or not (Path(source.location) / MODULES).is_file():
        return lines
    trust = ", trust_remote_code=True" if source.pruned else ""
    return [
        *lines,
        "# or, with its pooling:",
        "from sentence_transformers import SentenceTransformer",
        f"encoder = SentenceTransformer({source.location!r}{trust})",
    ]


def _opening_lines(source: Source, files: Sequence[str]) -> list[str]:
    if files and all(".onnx" in name for name in files):
        path = str(Path(source.location) / next(name for name in files if name.endswith(".onnx")))
        return ["import onnxruntime", f"session = onnxruntime.InferenceSession({path!r})"]
    method = (getattr(source.config, "quantization_config", None) or {}).get("quant_method")
    if source.pruned or method in READABLE:
        return ["import shrinkformer", f"model = shrinkformer.load({source.location!r})"]
    chosen = auto_class(source.architecture)
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
        fields = read_object(file, longest=_LONGEST_PLAN)
        return Plan.from_json(json.dumps(fields)) if fields else None
    except (ValueError, RecursionError):  # that it is no plan, or no text
        raise InputError(f"{PLAN_FILE} is no plan; remove it, or prune again.") from None


def _sizes_differ(config: PreTrainedConfig) -> bool:
    return bool((getattr(config, "shrinkformer", None) or {}).get("layers"))


def _before_pruning(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration without sizes per block: what stays are those before pruning."""
    dense = copy.deepcopy(config)
    dense.per_layer_config = None
    dense.shrinkformer = None
    return dense


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
