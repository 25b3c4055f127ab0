"""What making one part of one block smaller does to the predictions of the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from shrinkformer.architectures import LayerView
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.prune.damage import Damage
from shrinkformer.prune.levels import BlockLevels
from shrinkformer.prune.statistics import Progress
from shrinkformer.utils.journal import Journal

HEADS, QUERIES, VALUES, NEURONS = PARTS = ("heads", "query_width", "value_width", "neurons")

_SHARES = {
    HEADS: (0.92, 0.75, 0.58, 0.42, 0.25, 0.08),
    QUERIES: (0.75, 0.5, 0.25, 0.125),
    VALUES: (0.75, 0.5, 0.25, 0.125, 0.0625),
    NEURONS: (0.8, 0.625, 0.42, 0.25, 0.125, 0.0625, 0.02),
}
"""Where curves are measured; damage grows fast where little is left."""

POINTS = sum(map(len, _SHARES.values()))
"""Measurements for one block."""

_LEAST, _MOST = 1e-7, 1e30  # damage that is told apart; infinite damage is that of predictions that are not finite


@dataclass(frozen=True)
class Curve:
    """Damage as a function of how much is kept, between measured points linear in its logarithm.

    Attributes:
        kept: Measured sizes, ascending.
        damage: There.
        full: The size at which there is none.
    """

    kept: tuple[int, ...]
    damage: tuple[float, ...]
    full: int

    def at(self, kept: int) -> float:
        """Damage when so much is kept; where nothing was measured, infinite unless all is kept."""
        if kept >= self.full:
            return 0.0
        if not self.kept:
            return float("inf")
        if kept > self.kept[-1]:
            return self.damage[-1] * (self.full - kept) / (self.full - self.kept[-1])
        logs = np.log(np.clip(self.damage, _LEAST, _MOST))
        if kept < self.kept[0] and len(logs) > 1:  # it grows on as it grew before
            slope = (logs[1] - logs[0]) / (self.kept[1] - self.kept[0])
            return float(np.exp(logs[0] + min(slope, 0.0) * (kept - self.kept[0])))
        return float(np.exp(np.interp(kept, self.kept, logs)))


BlockCurves = dict[str, Curve]


def narrowable(view: LayerView) -> tuple[str, ...]:
    """Which parts of a block may become smaller beside its heads and neurons."""
    attention = view.architecture.attention
    if attention.fused:
        return ()
    return (VALUES,) if attention.rotary or view.queries > 1 else (QUERIES, VALUES)


def measure_curves(
    levels: Sequence[BlockLevels],
    damage: Damage,
    *,
    whole_heads: bool,
    progress: Progress = iter,
    values: Journal | None = None,
) -> list[BlockCurves]:
    """Measure the curves of every part of every block, each with all else as in the dense model.

    Args:
        levels: Of each block.
        damage: Of the dense model.
        whole_heads: Heads keep their width.
        progress: Wraps the loop over the blocks.
        values: Measured by an interrupted run, and now.
    """
    values = values or Journal()
    found = []
    for view in progress([level.view for level in levels]):
        level = levels[view.index]
        parts = [HEADS, NEURONS] if whole_heads else [HEADS, *narrowable(view), NEURONS]
        curves = {}
        for part in PARTS:
            full = int(getattr(level.size, part))
            sizes = sorted({max(1, round(share * full)) for share in _SHARES[part]} - {full}) if part in parts else []
            measured = []
            for kept in sizes:
                measure = partial(_measure, levels, damage, view.index, sized(level.size, **{part: kept}))
                measured.append(values.value(f"curve of block {view.index}, {part} {kept}", measure))
            curves[part] = Curve(tuple(sizes), tuple(measured), full)
        found.append(curves)
    return found


def _measure(levels: Sequence[BlockLevels], damage: Damage, index: int, size: LayerSize) -> float:
    """What one smaller block does."""
    blocks = [level.view.block for level in levels]
    return damage.of([*blocks[:index], levels[index].build(size).block, *blocks[index + 1 :]], index)


def sized(size: LayerSize, **changes: int) -> LayerSize:
    """A size with some changes; heads are as wide as the wider of their vectors."""
    changed: LayerSize = replace(size, **changes)  # type: ignore[arg-type]
    return replace(changed, head_size=max(changed.query_width, changed.value_width))
