"""Read folders with quantized weights as ordinary ones, without the library that wrote them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from shrinkformer.errors import CheckpointError
from shrinkformer.quantize.compressed_tensors import unread
from shrinkformer.quantize.formats import FORMATS
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.layout import Format
from shrinkformer.trust.weights import read_header, read_shards


def read_quantized_state_dict(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a folder, decoded.

    Args:
        folder: With safetensors files in the format of compressed-tensors (``pack-quantized``) or GPTQ; ours or those
            of llm-compressor, AutoGPTQ, GPTQModel, ...
        config: ``quantization_config`` of its config.json.
        dtype: Of all floating-point tensors that are returned. Scales are rounded to it before they are used, as
            transformers does, so that the weights are those of the same folder loaded by transformers with that type.

    Returns:
        Tensors by the names that ``state_dict()`` of the unquantized model has.

    Raises:
        CheckpointError: The method or format is unknown, or the files do not hold what the configuration says.
    """
    format_ = find_format(config)
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        ordinary = _open_shards(folder, stack)
        for module, tensors in _take_modules(folder, ordinary, format_):
            state[f"{module}.weight"] = format_.unpack(module, tensors, config).decode(dtype)
        for name, file in ordinary.items():
            if name in state:
                raise CheckpointError(f"{folder}: {name} is there both packed and as it is; remove one of them.")
            tensor = file.get_tensor(name)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state


def read_quantized_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, QuantizedWeight]:
    """The integers of a folder by module, without those that act-order gave groups of scattered columns.

    Args:
        folder: As for :func:`read_quantized_state_dict`.
        config: The same.

    Raises:
        CheckpointError: The method or format is unknown, or the files do not hold what the configuration says.
    """
    format_ = find_format(config)
    with ExitStack() as stack:
        modules = _take_modules(folder, _open_shards(folder, stack), format_)
        stored = {module: format_.unpack(module, tensors, config) for module, tensors in modules}
    return {module: some.weight(module) for module, some in stored.items() if some.in_order}


def _take_modules(folder: Path, files: dict[str, Any], format_: Format) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Tensors of every quantized module, which are taken out of ``files``."""
    modules = [name.removesuffix(f".{format_.suffixes[0]}") for name in files if _starts(name, format_)]
    if not modules:
        raise CheckpointError(
            f"{folder} has no {format_.suffixes[0]} tensor, although its config.json says {format_.name}; "
            "download or quantize the model again."
        )
    for module in modules:
        parts = [name for suffix in format_.suffixes if (name := f"{module}.{suffix}") in files]
        yield module, {name: files.pop(name).get_tensor(name) for name in parts}


def find_format(config: Mapping[str, Any]) -> Format:
    """The format that a ``quantization_config`` names.

    Raises:
        CheckpointError: It is unknown, or the model has quantized parts that are no weights.
    """
    method = config.get("quant_method")
    if method not in ("compressed-tensors", "gptq"):
        raise CheckpointError(
            f"quant_method {method!r} in config.json cannot be read; only compressed-tensors and gptq can. "
            "Load the model with transformers and the library that wrote it."
        )
    for part in unread(config):
        raise CheckpointError(f"quantization_config has {part}, which changes more than weights; it cannot be read.")
    return FORMATS[method]


def _starts(name: str, format_: Format) -> bool:
    return name.endswith(f".{format_.suffixes[0]}")


def _open_shards(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of every tensor; nothing is read before ``get_tensor``."""
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{folder} has no {SAFE_WEIGHTS_NAME} and no index of shards; pass a model's folder.")

    def open_(path: Path) -> dict[str, Any]:
        read_header(path)  # before it is mapped
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); download the model again.") from None
        return dict.fromkeys(file.keys(), file)

    return read_shards(folder, open_)
