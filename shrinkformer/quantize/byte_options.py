"""The choices for every part of a model, with what each takes in a file and what it does to predictions.

Damage is measured with one thing changed and all else as in the dense model; that of several changes is taken to be
the sum.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

from torch import nn

from shrinkformer.prune.budget import Budget
from shrinkformer.prune.curves import HEADS, NEURONS
from shrinkformer.prune.knapsack import Option
from shrinkformer.prune.shrink import Shrinker
from shrinkformer.quantize.byte_costs import ATTENTION, BITS, FLOAT, SUBLAYERS, ByteCosts
from shrinkformer.quantize.drafts import Choice, Drafts, untouched

_MEASURED = (4, 3, 2)
_FINER = 1 / 256  # four more bits: errors a sixteenth as large, their squares so much smaller

_STEPS = 48  # sizes of a feed-forward sublayer, at most


@dataclass(frozen=True)
class Part:
    """What is chosen for at once: a sublayer of a block, or a layer outside the blocks with all of its names."""

    index: int = -1
    sublayer: str = ""
    names: tuple[str, ...] = ()


State = dict[Part, Choice]
"""A choice for each part; outside the blocks the first of its bits counts."""

_Coarse = dict[tuple[Part, int, int], float]
"""Damage by part, place in it, and bits."""


class ByteOptions:
    """What can be chosen, and how it is tried.

    Args:
        shrinker: What is known about pruning the model; its damage is at the entrances of the dense blocks.
        drafts: Makes what is measured.
        costs: Bytes.
        limits: What every block must keep; its ``mu`` does not matter.

    Attributes:
        parts: Everything that a choice is made for: sublayers first, in their order.
    """

    def __init__(self, shrinker: Shrinker, drafts: Drafts, costs: ByteCosts, limits: Budget) -> None:
        self._levels, self._curves, self._damage = shrinker.levels, shrinker.curves, shrinker.damage
        self._drafts, self._costs, self._limits = drafts, costs, limits
        self.parts = [Part(level.view.index, sublayer) for level in self._levels for sublayer in SUBLAYERS]
        self.parts += [Part(names=names) for names in costs.outside]
        self._coarse = self._measure({})

    def tempered(self, left: Mapping[int, float]) -> "ByteOptions":
        """The same with drafts that hold rounding errors in blocks in part, see :meth:`Drafts.tempered`."""
        other = copy.copy(self)
        other._drafts = self._drafts.tempered(left)
        other._coarse = other._measure({key: damage for key, damage in self._coarse.items() if key[0].names})
        return other

    def of(self, part: Part, stress: float = 1.0) -> Iterator[Option[Choice]]:
        """All choices for a part that a file can hold.

        Args:
            part: The part.
            stress: How many times the damage of missing units counts, beside that of fewer bits.
        """
        for units in self.grid(part):
            for bits in product(BITS, (FLOAT,) if part.names else BITS):
                choice = Choice(units, (bits[0], bits[1]))
                cost, damage = self.cost(part, choice), self._expected(part, choice, stress)
                if cost is not None and math.isfinite(damage):
                    yield Option(cost, damage, choice)

    def cost(self, part: Part, choice: Choice) -> int | None:
        """Bytes; None where groups do not divide what is left."""
        if part.names:
            return self._costs.matrix(part.names, choice.bits[0])
        return self._costs.sublayer(part.index, part.sublayer, choice.units, choice.bits)

    def total(self, state: State) -> int:
        """Bytes of the whole file, at most."""
        return self._costs.rest + sum(self.cost(part, choice) or 0 for part, choice in state.items())

    def grid(self, part: Part) -> list[int]:
        """How many units a part may keep; 0 stands for a part that has none."""
        if part.names:
            return [0]
        size, limits = self._levels[part.index].size, self._limits
        if part.sublayer == ATTENTION:
            return list(range(min(limits.min_heads, size.heads), size.heads + 1))
        step = limits.round_to * max(1, round(size.neurons / _STEPS / limits.round_to))
        least = -(-limits.min_neurons // limits.round_to) * limits.round_to
        return sorted(
            {min(max(least, kept), size.neurons) for kept in range(step, size.neurons, step)} | {size.neurons}
        )

    def build(self, state: State) -> list[nn.Module]:
        """Drafts of all blocks."""
        return [self.block(level.view.index, state) for level in self._levels]

    def block(self, index: int, state: State) -> nn.Module:
        """The draft of one block."""
        return self._drafts.block(index, {sublayer: state[Part(index, sublayer)] for sublayer in SUBLAYERS})

    @contextmanager
    def around(self, state: State) -> Iterator[None]:
        """Let what stands outside the blocks be as chosen, and the examples enter it."""
        with self._drafts.surrounded({part.names: choice.bits[0] for part, choice in state.items() if part.names}):
            self._damage.start()
            yield

    def leave(self) -> None:
        """Put the examples back to the entrances of the dense blocks."""
        self._damage.start()
        self._damage.enter(self._dense)

    @property
    def _dense(self) -> Sequence[nn.Module]:
        return [level.view.block for level in self._levels]

    def _measure(self, known: _Coarse) -> _Coarse:
        """Damage of every layer in few bits, all else as it is, where it is not known."""
        found = dict(known)
        for part in self.parts:
            for place, bits in product((0,) if part.names else (0, 1), _MEASURED):
                if (part, place, bits) in known:
                    continue
                choice = self._coarser(part, place, bits)
                if self.cost(part, choice) is not None:
                    found[part, place, bits] = self._alone(part, choice)
        self.leave()
        return found

    def _alone(self, part: Part, choice: Choice) -> float:
        dense = self._dense
        if part.names:
            with self.around({part: choice}):
                return self._damage.of(dense)
        block = self._drafts.block(part.index, untouched(self._levels[part.index].view) | {part.sublayer: choice})
        return self._damage.of([*dense[: part.index], block, *dense[part.index + 1 :]], part.index)

    def _coarser(self, part: Part, place: int, bits: int) -> Choice:
        if part.names:
            return Choice(0, (bits, FLOAT))
        units = untouched(self._levels[part.index].view)[part.sublayer].units
        return Choice(units, (bits, FLOAT) if place == 0 else (FLOAT, bits))

    def _expected(self, part: Part, choice: Choice, stress: float) -> float:
        """Sum of what was measured alone; what is not there cannot be wrong."""
        if part.names:
            return self._of_bits(part, 0, choice.bits[0])
        curve = self._curves[part.index][HEADS if part.sublayer == ATTENTION else NEURONS]
        share = choice.units / curve.full
        coarser = sum(self._of_bits(part, place, choice.bits[place]) for place in (0, 1))
        return stress * curve.at(choice.units) + share * coarser

    def _of_bits(self, part: Part, place: int, bits: int) -> float:
        if bits == FLOAT:
            return 0.0
        if bits in _MEASURED:
            return self._coarse.get((part, place, bits), math.inf)
        return self._coarse.get((part, place, _MEASURED[0]), math.inf) * _FINER


def bits_by_name(costs: ByteCosts, choices: State) -> dict[str, int]:
    """Bits of every layer that a state quantizes, by its name."""
    bits_of: dict[str, int] = {}
    for part, choice in choices.items():
        if part.names:
            named = {part.names: choice.bits[0]}
        else:
            sites = costs.sites(part.sublayer)
            named = {tuple(costs.names(part.index, site)): bits for site, bits in zip(sites, choice.bits, strict=True)}
        bits_of |= {name: bits for names, bits in named.items() for name in names if bits != FLOAT}
    return bits_of
