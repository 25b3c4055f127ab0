"""How wide every sublayer becomes and how many bits every layer gets: the least damage within some bytes.

One knapsack over all parts makes a plan of what was measured alone. Then single changes of that plan are measured on
drafts of the planned model itself, and the knapsack takes those that help, several at once, until nothing does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import nn

from shrinkformer.errors import BudgetError
from shrinkformer.prune.damage import Damage
from shrinkformer.prune.knapsack import Option, choose, frontier, wary
from shrinkformer.prune.search import Say
from shrinkformer.quantize.byte_costs import BITS, FEED_FORWARD
from shrinkformer.quantize.byte_options import ByteOptions, Part, State
from shrinkformer.quantize.drafts import Choice
from shrinkformer.utils.parallel import ALONE, Workers
from shrinkformer.utils.work_time import Allowance

_CAUTION = (0.0, 0.004, 0.012, 0.03, 0.06)  # of the damage: what a change must promise, the more after failed attempts
_STRESSES = (1.0, 2.0, 0.5, 4.0)
_GAIN = 5e-4  # of the damage: improvements below it are noise
_STEP, _SMALLEST_STEP = 0.25, 0.03


@dataclass(frozen=True)
class Mixture:
    """A plan.

    Attributes:
        choices: For each part.
        damage: Of drafts, on the calibration examples.
        bytes: What the file takes, at most.
    """

    choices: State
    damage: float
    bytes: int


@dataclass
class _Draft:
    """The model as it is planned so far."""

    state: State
    blocks: list[nn.Module]
    damage: float


class ByteSearch:
    """Chooses widths and bits.

    Args:
        options: What can be chosen.
        damage: Measures drafts.
        seconds: The improvement stops after so long, for each plan, not counting what other processes take. One that
            is cut short depends on the speed of the machine, one that ends by itself does not.
        say: Gets a line for every round.
        workers: All of them stop at the same time.
    """

    def __init__(
        self,
        options: ByteOptions,
        damage: Damage,
        *,
        seconds: float,
        say: Say = lambda _: None,
        workers: Workers = ALONE,
    ) -> None:
        self.options, self._damage, self._seconds, self._say, self._workers = options, damage, seconds, say, workers
        self._time = Allowance(seconds)

    def run(self, allowed: int) -> Mixture:
        """The best plan that was found for so many bytes.

        Raises:
            BudgetError: Nothing is small enough.
        """
        self._time = Allowance(self._seconds)
        least = self.options.total({})
        least += sum(min(int(one.cost) for one in self.options.of(part)) for part in self.options.parts)
        if least > allowed:
            raise BudgetError(
                f"--target_ratio: {allowed:,} bytes are fewer than the {least:,} of the smallest model; raise it, or "
                "lower --min_heads, --min_neurons or --round_to."
            )
        spare = allowed - self.options.total({})
        draft = self._improved(self._first(spare), spare)
        if self._seconds and self._late():
            self._say(self._time.cut_short())
        self.options.leave()
        return Mixture(draft.state, draft.damage, self.options.total(draft.state))

    def _first(self, allowed: int) -> _Draft:
        """The best of the plans that sums promise, missing units counting more or less beside fewer bits.

        Sums say too little where much is taken away, and not in the same degree of both.
        """
        best: _Draft | None = None
        for stress in _STRESSES:
            if best is not None and self._late():
                break
            groups = [frontier(list(self.options.of(part, stress))) for part in self.options.parts]
            chosen, expected = choose(groups, allowed)
            draft = self._drafted(dict(zip(self.options.parts, chosen, strict=True)))
            self._say(f"plan of sums: divergence {draft.damage:.5f}, {expected:.5f} were expected")
            if best is None or draft.damage < best.damage:
                best = draft
        assert best is not None
        return best

    def _drafted(self, state: State) -> _Draft:
        blocks = self.options.build(state)
        with self.options.around(state):
            return _Draft(state, blocks, self._damage.of(blocks))

    def _improved(self, draft: _Draft, allowed: int) -> _Draft:
        """Change what measurably helps, several parts at once, until nothing does or the time is over."""
        step, rounds = _STEP, 0
        while step >= _SMALLEST_STEP and not self._late():
            better = self._attempt(self._changes(draft, step), draft, allowed)
            rounds += 1
            if better is None:
                step /= 2
                continue
            draft = better
            self._say(f"round {rounds}: divergence {draft.damage:.5f}")
        return draft

    def _late(self) -> bool:
        return self._workers.broadcast(self._time.is_used())

    def _attempt(self, groups: Sequence[Sequence[Option[Choice]]], draft: _Draft, allowed: int) -> _Draft | None:
        """The best combination of measured changes, with fewer of them as long as they do not add up."""
        for caution in _CAUTION:
            changed = dict(
                zip(self.options.parts, choose(wary(groups, caution * draft.damage), allowed)[0], strict=True)
            )
            if changed != draft.state:
                other = self._drafted(changed)
                if other.damage < draft.damage * (1 - _GAIN):
                    return other
        return None

    def _changes(self, draft: _Draft, step: float) -> list[list[Option[Choice]]]:
        """What changes add to the damage of the model as it is; the first of each group is no change."""
        parts = self.options.parts
        with self.options.around(draft.state):
            self._damage.enter(draft.blocks)
            inside = [self._part_changes(part, draft, step) for part in parts if not part.names]
        return inside + [self._part_changes(part, draft, step) for part in parts if part.names]

    def _part_changes(self, part: Part, draft: _Draft, step: float) -> list[Option[Choice]]:
        """Units and bits are changed one at a time; what several of them add is taken to be the sum."""
        now = draft.state[part]
        axes: list[dict[int, float]] = []
        for axis, values in enumerate(self._values(part, now, step)):
            axes.append({(now.units, *now.bits)[axis]: 0.0})
            for value in values:
                choice = _with(now, axis, value)
                if self.options.cost(part, choice) is not None and not self._late():
                    axes[-1][value] = self._changed(part, choice, draft) - draft.damage
        options = []
        for units, first, second in product(*axes):
            choice = Choice(units, (first, second))
            cost = self.options.cost(part, choice)
            if cost is not None:
                options.append(Option(cost, axes[0][units] + axes[1][first] + axes[2][second], choice))
        return options

    def _changed(self, part: Part, choice: Choice, draft: _Draft) -> float:
        """Damage of the model with one change."""
        state, blocks, index = draft.state | {part: choice}, draft.blocks, part.index
        if part.names:
            with self.options.around(state):
                return self._damage.of(blocks)
        return self._damage.of([*blocks[:index], self.options.block(index, state), *blocks[index + 1 :]], index)

    def _values(self, part: Part, now: Choice, step: float) -> tuple[list[int], list[int], list[int]]:
        """Neighbours of the units, and of both numbers of bits."""
        grid, few, many = self.options.grid(part), now.units / (1 + step), now.units * (1 + step)
        if part.sublayer == FEED_FORWARD:
            units = {min(grid, key=lambda kept: abs(kept - wanted)) for wanted in (few, many)}
        else:
            units = {min(round(few), now.units - 1), max(round(many), now.units + 1)} & set(grid)
        first, second = ([BITS[place] for place in _beside(BITS.index(bits))] for bits in now.bits)
        return sorted(units - {now.units}), first, [] if part.names else second


def _beside(place: int) -> list[int]:
    return [other for other in (place - 1, place + 1) if 0 <= other < len(BITS)]


def _with(choice: Choice, axis: int, value: int) -> Choice:
    values = [choice.units, *choice.bits]
    values[axis] = value
    return Choice(values[0], (values[1], values[2]))
