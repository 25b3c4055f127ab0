"""The formats that quantized weights are written in; none of them changes what a weight means."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shrinkformer.errors import CheckpointError
from shrinkformer.quantize.compressed_tensors import COMPRESSED_TENSORS
from shrinkformer.quantize.gptq_layout import GPTQ
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.layout import Format, Storable, Stored, Tensors
from shrinkformer.quantize.names import ALL_FORMATS, ONNX
from shrinkformer.quantize.scheme import Scheme


def _anything(_name: str, _weight: Storable) -> None:
    """Ordinary weights hold every scheme."""


def _decoded(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weight that readers of the packed formats compute for a model of that type, to the last bit."""
    grid = weight.grid
    stored = Stored(weight.codes, grid.scale, grid.zero, grid.scheme.group_of(grid.inputs), grid.scheme)
    return {f"{name}.weight": stored.decode(dtype)}


def _no_config(_weights: Mapping[str, Scheme], _ignored: Sequence[str]) -> None:
    """An ordinary folder says nothing about quantization."""


def _no_codes(name: str, _tensors: Tensors, _config: Mapping[str, Any]) -> Stored:
    raise CheckpointError(f"{name}: --format float keeps no codes; quantize again with --format compressed-tensors.")


FLOAT = Format(
    name="float", suffixes=("weight",), require=_anything, tensors=_decoded, config=_no_config, unpack=_no_codes
)

FORMATS: dict[str, Format] = {each.name: each for each in (COMPRESSED_TENSORS, GPTQ, FLOAT)}
"""By the name of ``--format``."""

assert (*FORMATS, ONNX) == ALL_FORMATS, "a format has its name in quantize/names.py, too"
