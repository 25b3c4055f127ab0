"""The layout of GPTQ: what AutoGPTQ and GPTQModel write, and transformers (with optimum and gptqmodel) and vLLM read.

Beside the bias a linear layer ``X`` with n inputs and m outputs has

=============  =========================  =======================================
``X.qweight``  int32, (words of n, m)     codes, packed along the inputs
``X.qzeros``   int32, (groups, words of m)  zeros, packed along the outputs
``X.scales``   floating, (groups, m)
``X.g_idx``    int32, (n,)                the group of every column
=============  =========================  =======================================

``checkpoint_format`` "gptq" holds zeros less one, "gptq_v2" as they are. A zero of 0 has no place in the former:
readers add one to whole words, and the carry spoils the neighbour. So asymmetric weights are written as "gptq_v2".

Source: GPTQModel 7.7 (``utils/model.py``), optimum 2.3 (``gptq/quantizer.py``).
"""

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.quantize.compressed_tensors import group_index
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.layout import Format, Storable, Stored, Tensors, require_words, scheme_of, tensor_of
from shrinkformer.quantize.packing import WORD, pack, unpack, words
from shrinkformer.quantize.scheme import WHOLE_ROW, Scheme

GROUP_SIZES = (WHOLE_ROW, 16, 32, 64, 128, 256, 512, 1024)
"""What GPTQModel's kernels take."""


def _require(name: str, weight: Storable) -> None:
    require_words(name, weight, "gptq")
    for what, size in (("outputs", weight.outputs), ("inputs", weight.inputs)):
        if size % WORD:
            raise InputError(
                f"{name}: --format gptq needs multiples of {WORD}, got {size} {what}; "
                f"prune with --round_to {WORD}, or use --format compressed-tensors."
            )
    size = weight.scheme.group_size
    if size not in GROUP_SIZES:
        raise InputError(
            f"{name}: --format gptq has no kernel for --group_size {size}; choose one of "
            f"{', '.join(map(str, GROUP_SIZES))}, or use --format compressed-tensors."
        )


def _tensors(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    _require(name, weight)
    grid, scheme = weight.grid, weight.grid.scheme
    zero = grid.zero.T.to(torch.uint8) - (1 if scheme.symmetric else 0)
    return {
        f"{name}.qweight": pack(weight.codes.T.contiguous(), scheme.bits, dim=0),
        f"{name}.qzeros": pack(zero.contiguous(), scheme.bits),
        f"{name}.scales": grid.scale.T.to(dtype).contiguous(),
        f"{name}.g_idx": scheme.group_of(grid.inputs).to(torch.int32),
    }


def _config(weights: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, Any]:
    """Everything that readers look at.

    Raises:
        InputError: There is more than one scheme, or the modules do not stand at the same places of all blocks.
    """
    schemes = set(weights.values())
    if len(schemes) != 1:
        raise InputError(
            f"--format gptq holds one number of bits and one group size, got {len(schemes)} different ones; "
            "use --format compressed-tensors."
        )
    (scheme,) = schemes
    block, modules = _places(list(weights), ignored)
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "lm_head": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "block_name_to_quantize": block,
        "modules_in_block_to_quantize": [modules],
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignored if name.startswith(f"{block}.")},
        "meta": {"quantizer": [f"shrinkformer:{importlib.metadata.version('shrinkformer')}"]},
    }


def _places(names: Sequence[str], ignored: Sequence[str]) -> tuple[str, list[str]]:
    """The path of the blocks, and endings that tell the quantized modules of a block from the others.

    optimum replaces every linear layer under the path of the blocks whose name has one of the endings.

    Raises:
        InputError: There is no such description.
    """
    split = [re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name) for name in names]
    blocks = {match[1] if match else "" for match in split}
    if len(blocks) != 1 or "" in blocks:
        odd = next(name for name, match in zip(names, split, strict=True) if match is None or match[1] != _first(split))
        raise InputError(
            f"{odd}: --format gptq holds layers of one list of blocks only; leave it out, or use "
            "--format compressed-tensors."
        )
    (block,) = blocks
    rest = [name for name in ignored if name.startswith(f"{block}.")]
    endings: list[str] = []
    for path in dict.fromkeys(match[3] for match in split if match):
        if any(name.endswith(path) for name in rest):  # "output.dense" also ends "attention.output.dense"
            endings += [f"{match[2]}.{path}" for match in split if match and match[3] == path]
        else:
            endings.append(path)
    wrong = [name for name in rest if any(name.endswith(ending) for ending in endings)]
    if wrong:
        raise InputError(
            f"{wrong[0]}: --format gptq cannot leave it out, because a quantized layer's name ends the same way; "
            "use --format compressed-tensors."
        )
    return block, endings


def _first(matches: Sequence[re.Match[str] | None]) -> str:
    return next((match[1] for match in matches if match), "")


def _unpack(name: str, tensors: Tensors, config: Mapping[str, Any]) -> Stored:
    packing = config.get("checkpoint_format") or config.get("format") or "gptq"
    if packing not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{name}: GPTQ format {packing!r} cannot be read; only 'gptq' and 'gptq_v2' can.")
    qweight = tensor_of(f"{name}.qweight", tensors, None)
    if qweight.dim() != 2 or qweight.dtype != torch.int32:
        raise CheckpointError(f"{name}.qweight should be a matrix of int32, got {qweight.dtype}; the file is damaged.")
    rows, outputs = qweight.shape
    inputs = _inputs(name, tensors, rows, config)
    scheme = scheme_of(name, rows * WORD // inputs, config.get("group_size", 128), config.get("sym", True))
    if words(inputs, scheme.bits) != rows or (scheme.bits != config.get("bits") and not config.get("dynamic")):
        raise CheckpointError(
            f"{name}.qweight has {rows} rows for {inputs} inputs, which is not {config.get('bits')} bits as "
            "config.json says; the file is damaged."
        )
    scale = tensor_of(f"{name}.scales", tensors, None, floating=True)
    groups = scale.shape[0]
    if tuple(scale.shape) != (groups, outputs) or groups < 1:
        raise CheckpointError(f"{name}.scales has shape {tuple(scale.shape)} for {outputs} outputs; it is damaged.")
    zeros = tensor_of(f"{name}.qzeros", tensors, (groups, words(outputs, scheme.bits)))
    if zeros.dtype != torch.int32:
        raise CheckpointError(f"{name}.qzeros should be packed in int32, got {zeros.dtype}; the file is damaged.")
    zero = unpack(zeros, scheme.bits, outputs)
    if packing == "gptq":
        zero = (zero + 1) & scheme.highest
    if f"{name}.g_idx" in tensors:
        group = group_index(f"{name}.g_idx", tensors, inputs, groups)
    elif scheme.groups(inputs) == groups:
        group = scheme.group_of(inputs)
    else:
        raise CheckpointError(f"{name}.scales has {groups} groups, expected {scheme.groups(inputs)}; it is damaged.")
    codes = unpack(qweight, scheme.bits, inputs, dim=0).T.contiguous()
    return Stored(codes, scale.T, zero.T, group, scheme)


def _bits(name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int:
    """Each layer may have bits of its own, which only the shapes of its tensors tell."""
    rows, inputs = shapes[f"{name}.qweight"], shapes.get(f"{name}.g_idx")
    counted = rows[0] * WORD // inputs[0] if rows and inputs and inputs[0] else config.get("bits")
    return scheme_of(name, counted, WHOLE_ROW, True).bits


def _inputs(name: str, tensors: Tensors, rows: int, config: Mapping[str, Any]) -> int:
    """Inputs of a layer: ``g_idx`` has one entry for each, and old files without it have the bits of config.json."""
    if f"{name}.g_idx" in tensors:
        inputs = tensors[f"{name}.g_idx"].numel()
    else:
        bits = scheme_of(name, config.get("bits"), WHOLE_ROW, True).bits
        inputs = rows * WORD // bits
    if inputs < 1 or rows < 1:
        raise CheckpointError(f"{name} has no inputs; the file is damaged.")
    return inputs


GPTQ = Format(
    name="gptq",
    suffixes=("qweight", "qzeros", "scales", "g_idx"),
    require=_require,
    tensors=_tensors,
    config=_config,
    unpack=_unpack,
    config_file="quantize_config.json",
    bits=_bits,
    one_scheme=lambda _schemes: "it holds one number of bits and one group size",
)
