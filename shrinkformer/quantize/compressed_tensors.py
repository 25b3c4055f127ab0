"""The layout of compressed-tensors, ``pack-quantized``: what llm-compressor writes and transformers and vLLM read.

Beside the bias a linear layer ``X`` with n inputs and m outputs has

=======================  ==========================  ======================================================
``X.weight_packed``      int32, (m, words of n)      codes, packed along the inputs
``X.weight_scale``       floating, (m, groups)
``X.weight_shape``       int64, (2,)                 m, n
``X.weight_zero_point``  int32, (words of m, groups) asymmetric only: zeros, packed along the outputs
=======================  ==========================  ======================================================

Codes and zeros count from 0. compressed-tensors thinks of them as signed numbers, but adds ``2^(bits - 1)`` to both
when it packs them, which makes them ours.

Source: compressed-tensors 0.20, ``compressors/pack_quantized``.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shrinkformer.errors import CheckpointError
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.layout import Format, Storable, Stored, Tensors, require_words, scheme_of, tensor_of
from shrinkformer.quantize.packing import pack, unpack, words
from shrinkformer.quantize.scheme import WHOLE_ROW, Scheme

_NAME, _PACKING = "compressed-tensors", "pack-quantized"


def _require(name: str, weight: Storable) -> None:
    require_words(name, weight, _NAME)


def _one_scheme(schemes: Collection[Scheme]) -> str:
    symmetric = all(scheme.symmetric for scheme in schemes)
    return "" if symmetric else "transformers loads zero points (--asymmetric) only where all layers have one scheme"


def _tensors(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    _require(name, weight)
    grid = weight.grid
    written = {
        f"{name}.weight_packed": pack(weight.codes, grid.scheme.bits),
        f"{name}.weight_scale": grid.scale.to(dtype, copy=True).contiguous(),  # one matrix may have two names
        f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not grid.scheme.symmetric:
        written[f"{name}.weight_zero_point"] = pack(grid.zero.to(torch.uint8), grid.scheme.bits, dim=0)
    return written


def shapes(
    name: str, outputs: int, inputs: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of what is written for a weight, without the weight."""
    groups = scheme.groups(inputs)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.weight_packed": (torch.int32, (outputs, words(inputs, scheme.bits))),
        f"{name}.weight_scale": (dtype, (outputs, groups)),
        f"{name}.weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        found[f"{name}.weight_zero_point"] = (torch.int32, (words(outputs, scheme.bits), groups))
    return found


def _config(weights: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, Any]:
    by_scheme: dict[Scheme, list[str]] = {}
    for target, scheme in _targets(weights, ignored).items():
        by_scheme.setdefault(scheme, []).append(target)
    return {
        "quant_method": _NAME,
        "format": _PACKING,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": _group(scheme, targets) for index, (scheme, targets) in enumerate(by_scheme.items())
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
    }


def _targets(weights: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, Scheme]:
    """What describes the quantized layers: a pattern for one place in all blocks, or else full names.

    "Linear" would be shorter, but it would also take the pooler of a BERT that is loaded without its head: then the
    names lack the prefix that ``ignore`` has.
    """
    targets: dict[str, Scheme] = {}
    places: dict[str, list[str]] = {}
    for name in weights:
        match = re.fullmatch(r"(?:.+?\.)??([^.]+)\.\d+\.(.+)", name)
        pattern = rf"re:(.*\.)?{re.escape(match[1])}\.\d+\.{re.escape(match[2])}$" if match else name
        places.setdefault(pattern, []).append(name)
    for pattern, names in places.items():
        schemes = {weights[name] for name in names}
        if len(schemes) == 1 and not any(_is_pattern(pattern, name) for name in ignored):
            targets[pattern] = schemes.pop()
        else:
            targets |= {name: weights[name] for name in names}
    return targets


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    whole = scheme.group_size == WHOLE_ROW
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if whole else "group",
            "group_size": None if whole else scheme.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": _PACKING,
    }


def _unpack(name: str, tensors: Tensors, config: Mapping[str, Any]) -> Stored:
    scheme = _scheme(name, config)
    sizes = tensor_of(f"{name}.weight_shape", tensors, (2,))
    outputs, inputs = (int(size) for size in sizes)
    if inputs < 1 or scheme.group_size > inputs or (scheme.group_size != WHOLE_ROW and inputs % scheme.group_size):
        raise CheckpointError(
            f"{name}.weight_shape says {inputs} inputs, which groups of {scheme.group_size} do not divide; "
            "config.json and the file belong to different models."
        )
    packed = tensor_of(f"{name}.weight_packed", tensors, None)
    if tuple(packed.shape) != (outputs, words(inputs, scheme.bits)) or packed.dtype != torch.int32:
        raise CheckpointError(
            f"{name}.weight_packed has shape {tuple(packed.shape)} and type {packed.dtype}, but {outputs} x {inputs} "
            f"codes of {scheme.bits} bits take {(outputs, words(inputs, scheme.bits))} int32; the file is damaged, or "
            "was written by compressed-tensors before 0.18, which packed 3 bits otherwise (quantize it again)."
        )
    groups = scheme.groups(inputs)
    scale = tensor_of(f"{name}.weight_scale", tensors, (outputs, groups), floating=True)
    zero = torch.full((outputs, groups), int(scheme.middle), dtype=torch.uint8)
    if not scheme.symmetric:
        stored = tensor_of(f"{name}.weight_zero_point", tensors, (words(outputs, scheme.bits), groups))
        if stored.dtype != torch.int32:
            raise CheckpointError(f"{name}.weight_zero_point should be packed in int32, got {stored.dtype}.")
        zero = unpack(stored, scheme.bits, outputs, dim=0)
    group = scheme.group_of(inputs)
    if f"{name}.weight_g_idx" in tensors:  # llm-compressor with "actorder": "group", until 2026
        group = group_index(f"{name}.weight_g_idx", tensors, inputs, groups)
    return Stored(unpack(packed, scheme.bits, inputs), scale, zero, group, scheme)


def group_index(name: str, tensors: Tensors, inputs: int, groups: int) -> Tensor:
    """The group of every column as a file has it, ``(inputs,)`` int64.

    Raises:
        CheckpointError: It is missing, or points to groups that are not there.
    """
    index = tensor_of(name, tensors, (inputs,)).to(torch.int64)
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise CheckpointError(f"{name} points outside the {groups} groups of the scales; the file is damaged.")
    return index


def _scheme(name: str, config: Mapping[str, Any]) -> Scheme:
    group = _group_of(name, config)
    packing = group.get("format") or config.get("format")
    if packing != _PACKING:
        raise CheckpointError(f"{name}: compressed-tensors format {packing!r} cannot be read; only {_PACKING!r} can.")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise CheckpointError(f"{name}: quantization_config has {key}; only quantized weights can be read.")
    weights = group.get("weights") or {}
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise CheckpointError(
            f"{name}: weights of type {weights.get('type')!r} with strategy {strategy!r} cannot be read; "
            "only int with group or channel can."
        )
    size = WHOLE_ROW if strategy == "channel" else weights.get("group_size")
    return scheme_of(name, weights.get("num_bits"), size, weights.get("symmetric", True))


def _group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config group of a module: an exact name wins over a pattern, a pattern over a class of modules."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError("quantization_config has no config_groups; quantize the model again.")
    pairs = [(target, group) for group in groups.values() for target in group.get("targets") or ()]
    for matches in (_is_name, _is_pattern, _is_class):
        for target, group in pairs:
            if matches(str(target), name):
                found: Mapping[str, Any] = group
                return found
    raise CheckpointError(f"{name} is packed, but no target in quantization_config matches it; the file is damaged.")


def _is_name(target: str, name: str) -> bool:
    return target == name


def _is_pattern(target: str, name: str) -> bool:
    try:
        return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None
    except re.error:
        raise CheckpointError(
            f"quantization_config has the target {target!r}, which is no regular expression."
        ) from None


def _is_class(target: str, _name: str) -> bool:
    return target == "Linear"


def unread(config: Mapping[str, Any]) -> Iterator[str]:
    """Parts of a configuration that change the model beyond its weights, which nothing here would heed."""
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            yield key
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        yield "sparsity_config"


COMPRESSED_TENSORS = Format(
    name=_NAME,
    suffixes=("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    require=_require,
    tensors=_tensors,
    config=_config,
    unpack=_unpack,
    bits=lambda name, _shapes, config: _scheme(name, config).bits,
    one_scheme=_one_scheme,
)
