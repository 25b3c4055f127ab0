"""Finished blocks of a quantization on disk, so that a crash or a kill costs one block at most."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from shrinkformer.architectures import LayerView, Projection
from shrinkformer.prune.resume import BlockFiles
from shrinkformer.quantize.config import LayerReport
from shrinkformer.quantize.grid import Grid, QuantizedWeight
from shrinkformer.quantize.scheme import Scheme


@dataclass(frozen=True)
class Finished:
    """A quantized layer.

    Attributes:
        path: In the block.
        weight: Its integers.
        report: How good they are.
        bias: What its bias became, ``(outputs,)``; None where it has none.
    """

    path: str
    weight: QuantizedWeight
    report: LayerReport
    bias: Tensor | None

    def put(self, linear: Projection) -> None:
        """Write weight and bias into the layer."""
        linear.weight.copy_(self.weight.decode().to(linear.weight.dtype))
        if linear.bias is not None and self.bias is not None:
            linear.bias.copy_(self.bias)


class QuantizedBlocks(BlockFiles):
    """The layers of finished blocks."""

    def read(self, view: LayerView) -> list[Finished]:
        """The layers of a finished block, in the order in which they were quantized, on the block's device."""
        tensors, metadata = self._load(view.index, view.attention_output.weight.device)
        found = []
        for entry in json.loads(metadata["layers"]):
            path, report = entry["path"], entry["report"]
            codes, scale, zero = (tensors[f"{path}:{name}"] for name in ("codes", "scale", "zero"))
            weight = QuantizedWeight(codes, Grid(Scheme(**entry["scheme"]), scale, zero, codes.shape[1]))
            report = LayerReport(**{**report, "trust": tuple(report["trust"])})
            found.append(Finished(path, weight, report, tensors.get(f"{path}:bias")))
        return found

    def write(self, block: int, layers: Sequence[Finished]) -> None:
        """Keep the layers of a block."""
        tensors: dict[str, torch.Tensor] = {}
        for layer in layers:
            grid = layer.weight.grid
            parts = {"codes": layer.weight.codes, "scale": grid.scale, "zero": grid.zero, "bias": layer.bias}
            tensors |= {f"{layer.path}:{name}": part for name, part in parts.items() if part is not None}
        entries = [
            {"path": layer.path, "scheme": asdict(layer.weight.grid.scheme), "report": asdict(layer.report)}
            for layer in layers
        ]
        self._save(block, tensors, {"layers": json.dumps(entries)})
