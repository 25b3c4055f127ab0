"""What the headers of weight files say: types, shapes and bits, without reading a weight."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from shrinkformer.architectures import find_architecture
from shrinkformer.errors import CheckpointError
from shrinkformer.quantize.reading import find_format
from shrinkformer.trust.weights import SAFE_INDEX, SAFE_WEIGHTS, StoredTensor, block_of, read_header, read_shards

READABLE = ("compressed-tensors", "gptq")
"""Methods whose weights this package reads."""


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the safetensors files by name; nothing but headers is read, or mapped, however large a file is.

    Raises:
        CheckpointError: A file is damaged or missing.
    """
    if not (folder / SAFE_WEIGHTS).exists() and not (folder / SAFE_INDEX).exists():
        return {}
    return read_shards(folder, read_header)


def read_quantization(config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, Any] | None:
    """Method of a quantized checkpoint, and the bits of every linear layer where they can be known.

    Returns:
        ``method``, ``bits`` (all numbers of bits), and ``layers``: number of the block, or None, name and bits; None
        for a checkpoint that is not quantized.

    Raises:
        CheckpointError: The configuration is damaged.
    """
    section = getattr(config, "quantization_config", None)
    if section is None:
        return None
    if not isinstance(section, dict) or not isinstance(section.get("quant_method"), str):
        raise CheckpointError("quantization_config in config.json names no method; download the model again.")
    method = str(section.get("quant_method"))
    if method not in READABLE:  # we cannot say more about it
        bits = section.get("bits")
        return {"method": method, "bits": [bits] if isinstance(bits, int) else [], "layers": []}
    format_, layers = find_format(section), find_architecture(config.model_type).layers
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    modules = [
        name.removesuffix(f".{format_.suffixes[0]}") for name in tensors if name.endswith(f".{format_.suffixes[0]}")
    ]
    if tensors and not modules:
        raise CheckpointError(
            f"no {format_.suffixes[0]} tensor is in the files, although config.json says {method}; download "
            "the model again."
        )
    rows = [
        {"layer": block_of(name, layers), "name": name, "bits": format_.bits(name, shapes, section)} for name in modules
    ]
    rows.sort(key=lambda row: (row["layer"] is None, row["layer"] or 0, row["name"]))
    return {"method": method, "bits": sorted({row["bits"] for row in rows}), "layers": rows}


__all__ = ["READABLE", "StoredTensor", "block_of", "read_header", "read_headers", "read_quantization"]
