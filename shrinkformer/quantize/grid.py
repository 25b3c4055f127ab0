"""Grids: the values that a weight may take, one row of them for each group of neighbouring columns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from shrinkformer.quantize.scheme import Scheme

_LEAST, _STEPS = 0.2, 81
"""A range is shrunk to no less than this part of it, in so many steps."""


@dataclass(frozen=True)
class Grid:
    """What the codes of a weight mean: ``weight = scale * (code - zero)``.

    Attributes:
        scheme: How it is stored.
        scale: ``(outputs, groups)``, representable in the type that is stored; may be negative.
        zero: The same shape; whole numbers unless the scheme is binary.
        inputs: Columns of the weight.
    """

    scheme: Scheme
    scale: Tensor
    zero: Tensor
    inputs: int

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every column, both ``(outputs, inputs)``."""
        group = self.scheme.group_of(self.inputs, self.scale.device)
        return self.scale[:, group], self.zero[:, group]

    def encode(self, weight: Tensor) -> Tensor:
        """The nearest codes, ``(outputs, inputs)`` uint8."""
        scale, zero = self.columns
        return nearest(weight, scale, zero, self.scheme.highest).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The weight that codes stand for, in the type of the scales."""
        scale, zero = self.columns
        return scale * (codes.to(scale.dtype) - zero)

    def some(self, rows: Tensor) -> Self:
        """The grid of some rows, ``(rows,)`` int64."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows])

    def rows(self, chosen: Tensor, other: Self) -> Self:
        """This grid, with the rows that ``chosen`` (``(outputs,)`` bool) marks taken from another one."""
        return replace(
            self,
            scale=torch.where(chosen[:, None], other.scale, self.scale),
            zero=torch.where(chosen[:, None], other.zero, self.zero),
        )


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers; every format writes these, and none of them changes what they mean.

    Attributes:
        codes: ``(outputs, inputs)`` uint8, 0 to ``grid.scheme.highest``.
        grid: What they mean.
    """

    codes: Tensor
    grid: Grid

    @property
    def outputs(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        """Columns."""
        return self.codes.shape[1]

    @property
    def scheme(self) -> Scheme:
        """How it is stored."""
        return self.grid.scheme

    def decode(self) -> Tensor:
        """The weight that the codes stand for, ``(outputs, inputs)``, in the type of the scales."""
        return self.grid.decode(self.codes)

    def some(self, rows: Tensor) -> Self:
        """Some rows, ``(rows,)`` int64."""
        return replace(self, codes=self.codes[rows], grid=self.grid.some(rows))

    def split(self, sizes: Sequence[int]) -> "list[QuantizedWeight]":
        """As many rows each."""
        grid = self.grid
        parts = zip(*(torch.split(entry, list(sizes)) for entry in (self.codes, grid.scale, grid.zero)), strict=True)
        return [QuantizedWeight(codes, replace(grid, scale=scale, zero=zero)) for codes, scale, zero in parts]

    @classmethod
    def cat(cls, parts: "Sequence[QuantizedWeight]") -> "QuantizedWeight":
        """The rows of weights of one scheme and width, one after the other."""
        scale, zero = (torch.cat([getattr(part.grid, name) for part in parts]) for name in ("scale", "zero"))
        return cls(torch.cat([part.codes for part in parts]), replace(parts[0].grid, scale=scale, zero=zero))


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, highest: int) -> Tensor:
    """Codes nearest to a weight, as floating-point numbers; everything broadcasts."""
    return torch.div(weight, scale).add_(zero).round_().clamp_(0, highest)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as a file of type ``dtype`` holds them: rounded now, so that what is solved for is what is stored."""
    limits = torch.finfo(dtype)
    size = scale.abs().clamp(min=limits.smallest_normal, max=limits.max)
    return torch.where(scale < 0, -size, size).to(dtype).to(scale.dtype)


def fit_grid(weight: Tensor, scheme: Scheme, *, dtype: torch.dtype, search: bool = True) -> Grid:
    """The grid of a weight, group by group.

    Args:
        weight: ``(outputs, inputs)`` float32 or float64.
        scheme: How it will be stored.
        dtype: Of the stored scales.
        search: Try ranges smaller than that of the group, and take the one with the smallest rounding error; a
            symmetric grid tries both signs of the scale. Otherwise the range of the group, as it stands.

    Source:
        The search over shrunk ranges: Frantar et al., GPTQ, arXiv 2210.17323, published code, with the 2.4-norm. Signed
        scales: Intel AutoRound, "full range symmetric".
    """
    grouped, inside = _grouped(weight, scheme)
    low = torch.where(inside, grouped, 0).amin(-1).clamp(max=0)
    high = torch.where(inside, grouped, 0).amax(-1).clamp(min=0)
    candidates = [1.0] if not search else torch.linspace(1.0, _LEAST, _STEPS).tolist()
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for part in candidates:
        for step, zero in _ranges(low * part, high * part, scheme, search):
            scale = storable(step, dtype)
            error = _rounding_error(grouped, inside, scale, zero, scheme)
            if best is None:
                best = error, scale, zero
                continue
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, zero, best[2]),
            )
    assert best is not None
    return Grid(scheme, best[1], best[2], weight.shape[1])


def _grouped(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """A weight as ``(outputs, groups, columns of a group)``, and which of these entries are columns at all."""
    outputs, inputs = weight.shape
    width, groups = scheme.width(inputs), scheme.groups(inputs)
    missing = groups * width - inputs
    padded = torch.nn.functional.pad(weight, (0, missing)).view(outputs, groups, width)
    inside = torch.arange(groups * width, device=weight.device).view(1, groups, width) < inputs
    return padded, inside


def _ranges(low: Tensor, high: Tensor, scheme: Scheme, search: bool) -> list[tuple[Tensor, Tensor]]:
    """Scale and zero of grids that span a range."""
    if not scheme.symmetric:
        scale = (high - low) / scheme.highest
        safe = torch.where(scale > 0, scale, 1)
        return [(safe, torch.round(-low / safe).clamp(0, scheme.highest))]
    largest = torch.maximum(-low, high)
    zero = torch.full_like(largest, scheme.middle)
    if scheme.bits == 1:
        return [(2 * largest, zero)]
    if not search:
        return [(largest / (scheme.highest - scheme.middle + 0.5), zero)]  # both sides clip half a step at most
    scale = largest / scheme.middle
    return [(scale, zero), (-scale, zero)]


def _rounding_error(grouped: Tensor, inside: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Sum of ``|error|^2.5``: a square and a root, which are five times as fast as the power of 2.4."""
    scale, zero = scale[..., None], zero[..., None]
    off = nearest(grouped, scale, zero, scheme.highest).sub_(zero).mul_(scale).sub_(grouped).abs_()
    return off.sqrt().mul_(off.square_()).mul_(inside).sum(-1)
