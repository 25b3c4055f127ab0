"""What is known about the layers of a site: moments of their input, and of what their output lacks."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from shrinkformer.prune.moments import Moments
from shrinkformer.prune.passes import BlockPasses, DensePass
from shrinkformer.prune.sites import Site
from shrinkformer.utils.parallel import Workers
from shrinkformer.utils.precision import fast_products, half_precision, round_rows


class CrossMoments:
    """Running sums over tokens of ``s x'`` and of ``s``, in float64; products of a batch are float32.

    Args:
        outputs: Entries of ``s``.
        inputs: Entries of ``x``.
        device: Where the sums are kept.

    Attributes:
        second: ``(outputs, inputs)``.
        total: ``(outputs,)``.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None:
        self.second = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self.total = torch.zeros(outputs, dtype=torch.float64, device=device)

    def update(self, left: Tensor, right: Tensor) -> None:
        """Add tokens: ``(tokens, outputs)`` and ``(tokens, inputs)``."""
        dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
        self.second.add_(left.to(dtype).T @ right.to(dtype))
        self.total.add_(left.sum(0, dtype=torch.float64))

    def subtract(self, second: Tensor, total: Tensor) -> None:
        """Take away sums of the same shapes."""
        self.second -= second
        self.total -= total

    def merge(self, other: "CrossMoments") -> None:
        """Add the tokens that ``other`` has seen."""
        self.second += other.second
        self.total += other.total


@dataclass(frozen=True)
class Fold:
    """What one part of the calibration examples says about a site.

    Attributes:
        inputs: Moments of the input ``x`` of the layers in the quantized model.
        shifts: What the layers' outputs should get beside ``W x``, in parts that may be trusted to different degrees:
            cross moments of each part with ``x``. Empty where nothing is to be corrected.
        shared: Shifts are of the input, to be multiplied by the weight of each layer; otherwise of the output.
    """

    inputs: Moments
    shifts: tuple[CrossMoments, ...]
    shared: bool


def merged(folds: Sequence[Fold]) -> Fold:
    """All examples together."""
    first = folds[0]
    inputs = Moments.zeros(first.inputs.n, first.inputs.device)
    shifts = tuple(CrossMoments(len(part.total), first.inputs.n, part.total.device) for part in first.shifts)
    for fold in folds:
        inputs.merge(fold.inputs)
        for part, other in zip(shifts, fold.shifts, strict=True):
            part.merge(other)
    return Fold(inputs, shifts, first.shared)


@torch.no_grad()
def observe(
    site: Site, passes: BlockPasses, dense: DensePass | None, workers: Workers, *, rounded: bool, folds: int = 2
) -> list[Fold]:
    """Collect what is known about a site, in as many parts of the examples.

    Args:
        site: The layers.
        passes: Of the block whose earlier sites are quantized.
        dense: What the dense model wants; None where nothing is corrected.
        workers: Share the examples; all of them get the sums.
        rounded: Round rows to bfloat16, and multiply them as fast as the processor can.
        folds: Parts; micro-batches are dealt out to them in turn.
    """
    linear = passes.view.linear(site.paths[0])
    device, inputs, shared = linear.weight.device, linear.in_features, not site.residual
    parts, outputs = 0 if dense is None else 1 if shared else 2, inputs if shared else linear.out_features
    found = [
        Fold(
            Moments.zeros(inputs, device, precision="fast" if rounded else "auto"),
            tuple(CrossMoments(outputs, inputs, device) for _ in range(parts)),
            shared,
        )
        for _ in range(folds)
    ]
    for index in range(len(passes.stream)):
        fold = found[(index * workers.size + workers.rank) % folds]
        with half_precision(device, linear.weight.dtype) if rounded else nullcontext():
            rows, lacking = _look(site, passes, dense, index)
        if rounded:
            rows, *lacking = (round_rows(some) for some in (rows, *lacking))
        with fast_products(device) if rounded else nullcontext():
            for part, one in zip(fold.shifts, lacking, strict=True):
                part.update(one, rows)
        fold.inputs.update(rows)
    for fold in found:
        if parts == 2:  # what is wanted, less what the layer makes of its input now
            weight = linear.weight.double()
            fold.shifts[0].subtract(weight @ fold.inputs.second, weight @ fold.inputs.total)
        fold.inputs.all_reduce()
        for part in fold.shifts:
            workers.sum_(part.second, part.total)
    return found


def _look(site: Site, passes: BlockPasses, dense: DensePass | None, index: int) -> tuple[Tensor, list[Tensor]]:
    """Of one micro-batch: rows of the input, and what each part of the shift is to be learnt from.

    Where the site ends a sublayer, the first part is all of the output that is wanted.
    """
    if dense is None or not site.residual:
        rows = passes.inputs(site.paths[0], index)
        return rows, [] if dense is None else [dense.inputs(site, index) - rows]
    rows, residual = passes.ending(site, index)
    wanted, before = dense.wanted(site, index)
    return rows, [wanted, before - residual]
