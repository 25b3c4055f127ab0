"""What the layers of a block see in the dense model and in the quantized one, side by side."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shrinkformer.architectures import LayerView
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.stream import BlockStream
from shrinkformer.quantize.sites import Site


class CrossMoments:
    """Running sums over tokens of ``s x'`` and of ``s``, in float64; products of a batch are float32.

    Attributes:
        second: ``(outputs, inputs)``.
        total: ``(outputs,)``.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None:
        self.second = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self.total = torch.zeros(outputs, dtype=torch.float64, device=device)

    def update(self, left: Tensor, right: Tensor) -> None:
        """Add tokens: ``(tokens, outputs)`` and ``(tokens, inputs)``."""
        self.second.add_(left.float().T @ right.float())
        self.total.add_(left.sum(0, dtype=torch.float64))

    def merge(self, other: "CrossMoments") -> None:
        """Add the tokens that ``other`` has seen."""
        self.second += other.second
        self.total += other.total

    def all_reduce(self) -> None:
        """Sum over all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.second)
            torch.distributed.all_reduce(self.total)


@dataclass(frozen=True)
class Fold:
    """What one half of the calibration examples says about a site.

    Attributes:
        inputs: Moments of the input ``x`` of the quantized model's layers.
        shifts: What the layers' outputs should get beside ``W x``, in parts that may be trusted to different degrees:
            cross moments of each part with ``x``. Either of the input (``shared``), to be multiplied by the weight of each
            layer, or of the output.
        shared: Whether shifts are of the input.
    """

    inputs: Moments
    shifts: tuple[CrossMoments, ...]
    shared: bool


class _Reached(Exception):  # noqa: N818
    """Ends a block's forward pass when all that was wanted is recorded."""


@contextmanager
def _recorded(modules: Mapping[str, nn.Module], last: str) -> Iterator[dict[str, Tensor]]:
    """Inputs of modules by name; the pass ends when the last one is reached."""
    found: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = args[0]
            if name == last:
                raise _Reached

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield found
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _inputs(stream: BlockStream, view: LayerView, path: str, index: int) -> Tensor:
    """Rows of the input of one layer, ``(tokens, features)``."""
    with _recorded({path: view.linear(path).module}, path) as found:
        stream.call(view.block, index)
    rows, mask = found[path], stream.mask(index)
    return rows.reshape(*mask.shape, rows.shape[-1])[mask]


def _with_residual(stream: BlockStream, view: LayerView, site: Site, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the input of a layer that ends a sublayer, of its output without bias, and of what is added to it."""
    linear, mask = view.linear(site.paths[0]), stream.mask(index)
    if site.residual == "input":
        rows = _inputs(stream, view, site.paths[0], index)
        residual = stream.hidden(index)[mask]
    elif view.architecture.pre_norm:
        with _recorded({"x": linear.module}, "") as found:
            output = stream.call(view.block, index)
        rows = found["x"].reshape(*mask.shape, linear.in_features)[mask]
        residual = output[mask] - nn.functional.linear(rows, linear.weight, linear.bias)
    else:
        middle = view.architecture.feed_forward.inputs[0]
        with _recorded({"x": linear.module, "r": view.linear(middle).module}, "x") as found:
            stream.call(view.block, index)
        rows, residual = (found[name].reshape(*mask.shape, -1)[mask] for name in ("x", "r"))
    return rows, nn.functional.linear(rows, linear.weight), residual


@torch.no_grad()
def observe(
    site: Site, dense: LayerView, quantized: LayerView, streams: tuple[BlockStream, BlockStream], folds: int
) -> list[Fold]:
    """Collect what is known about a site, in two halves of the examples if there are enough.

    Args:
        site: The layers.
        dense: The block as it was.
        quantized: The block whose earlier sites are quantized.
        streams: Of the dense and of the quantized model, at the entrance of the block.
        folds: How many parts.
    """
    device = quantized.linear(site.paths[0]).weight.device
    inputs = quantized.linear(site.paths[0]).in_features
    outputs = quantized.linear(site.paths[0]).out_features
    shared = not site.residual
    found = [
        Fold(
            Moments.zeros(inputs, device),
            tuple(CrossMoments(inputs if shared else outputs, inputs, device) for _ in range(1 if shared else 2)),
            shared,
        )
        for _ in range(folds)
    ]
    for index in range(len(streams[0])):
        fold = found[index % folds]
        if shared:
            wanted, rows = (
                _inputs(stream, view, site.paths[0], index)
                for stream, view in zip(streams, (dense, quantized), strict=True)
            )
            fold.shifts[0].update(wanted - rows, rows)
        else:
            (_, wanted, before), (rows, output, after) = (
                _with_residual(stream, view, site, index)
                for stream, view in zip(streams, (dense, quantized), strict=True)
            )
            fold.shifts[0].update(wanted - output, rows)
            fold.shifts[1].update(before - after, rows)
        fold.inputs.update(rows)
    return found
