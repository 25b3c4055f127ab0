"""Which sizes the blocks get: the least damage to predictions within a budget.

Curves of single parts add up well while little is removed. Later they do not, because sublayers make up for each other
or make each other's errors worse; so the first plan is improved by small steps whose damage is measured on the pruned
model itself. Both are the same knapsack.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import nn

from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import BudgetError
from shrinkformer.prune.budget import CostModel
from shrinkformer.prune.curves import HEADS, NEURONS, QUERIES, VALUES, BlockCurves, sized
from shrinkformer.prune.damage import Damage
from shrinkformer.prune.knapsack import Option, choose, frontier, wary
from shrinkformer.prune.ledger import name_of
from shrinkformer.prune.levels import BlockLevels
from shrinkformer.prune.uniform import uniform_counts
from shrinkformer.utils.journal import Journal
from shrinkformer.utils.parallel import ALONE, Workers
from shrinkformer.utils.work_time import Allowance

_SLACK = 1e-9  # of the budget, for rounding in sums
_STEPS = 96  # sizes of a feed-forward sublayer, at most
_WIDTHS = 16  # widths of a head, at most
_CAUTION = (0.0, 0.002, 0.006, 0.02)  # of the damage: what a single change must promise, the more after failed attempts
_GAIN = 5e-4  # of the damage: improvements below it are noise
_WORTHWHILE = 0.04  # of the damage: a round that gains less is the last
_SMALLEST_STEP = 0.1
_HOPELESS = 4.0  # times the damage that curves expect at least: curves are not that wrong

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A plan.

    Attributes:
        sizes: Of the blocks.
        damage: On the examples, before any refit to the pruned model; infinite where nothing was measured.
        first: Sizes of the first plan, from curves alone.
        expected: What the curves add up to for these.
        cut_short: Whether time was over before the search ended by itself; then it depends on the speed of the machine.
    """

    sizes: list[LayerSize]
    damage: float
    first: list[LayerSize]
    expected: float = 0.0
    cut_short: bool = False

    @property
    def predicted(self) -> float:
        """Damage of the plan, as far as it is known before any refit."""
        return self.expected if self.damage == float("inf") else self.damage


class Search:
    """Chooses sizes.

    Args:
        levels: Of each block.
        curves: Of each block.
        damage: Measures.
        costs: MACs or time of sizes, and the budget.
        seconds: The improvement stops after so long, not counting what other processes take.
        say: Gets a line for every round.
        workers: All of them stop at the same time.
        values: Measured by an interrupted run, and now.
    """

    def __init__(
        self,
        levels: Sequence[BlockLevels],
        curves: Sequence[BlockCurves],
        damage: Damage,
        costs: CostModel,
        *,
        seconds: float,
        say: Say = lambda _: None,
        workers: Workers = ALONE,
        values: Journal | None = None,
    ) -> None:
        self._values = values or Journal()
        self._levels, self._curves, self._damage, self._costs = levels, curves, damage, costs
        self._seconds, self._say, self._workers = seconds, say, workers
        self._cut_short = False
        self._allowance = costs.budget.mu * costs.dense * (1 - _SLACK)

    def run(self) -> Found:
        """The best plan that was found.

        Raises:
            BudgetError: The budget is below what every block must keep.
            InputError: No sizes that all blocks may have alike fit the budget.
        """
        if self._costs.budget.uniform:
            return self._run_uniform()
        if self._costs.budget.mu == 1:
            dense = [level.size for level in self._levels]
            return Found(dense, 0.0, dense)
        sizes, expected = self._first_plan()
        self._say(f"first plan: expected divergence {expected:.5f}")
        return replace(self._improve(sizes), expected=expected)

    def cost_of_uniformity(self, sizes: Sequence[LayerSize]) -> dict[str, float]:
        """What the curves add up to for blocks that are all alike, and for those of the best plan that is free.

        Args:
            sizes: Of blocks with whole heads, within the budget.
        """
        expected = self._expected(sizes)
        try:
            free = self._first_plan()[1]
        except BudgetError:  # by a step of the knapsack's grid: there is hardly any choice
            free = expected
        return {"divergence": expected, "free_divergence": min(free, expected)}

    def _first_plan(self) -> tuple[list[LayerSize], float]:
        """The sizes that curves alone ask for, and what they expect of them."""
        groups = [
            group
            for curves, level in zip(self._curves, self._levels, strict=True)
            for group in (list(self._attention_options(curves, level)), list(self._neuron_options(curves, level)))
        ]
        chosen, expected = choose([frontier(group) for group in groups], self._allowance)
        return self._joined(chosen), expected

    def _run_uniform(self) -> Found:
        """The best plan whose blocks are all alike: the number of heads decides, so those worth it are measured."""
        plans = sorted((self._costs.sizes(counts) for counts in uniform_counts(self._costs)), key=self._expected)
        limit = _HOPELESS * self._expected(plans[0])
        self._say(f"first plan, all blocks alike: expected divergence {self._expected(plans[0]):.5f}")
        time, best, least = self._time(), plans[0], float("inf")
        for sizes in [sizes for sizes in plans if self._expected(sizes) <= limit]:
            if self._is_over(time):
                break
            damage = self._measured(sizes)
            self._say(f"{sizes[0].heads} heads, {sizes[0].neurons} neurons: divergence {damage:.5f}")
            if damage < least:
                best, least = sizes, damage
        return Found(best, least, plans[0], self._expected(plans[0]), self._cut_short)

    def _expected(self, sizes: Sequence[LayerSize]) -> float:
        """What the curves add up to; heads are whole."""
        each = zip(self._curves, sizes, strict=True)
        return sum(curves[HEADS].at(size.heads) + curves[NEURONS].at(size.neurons) for curves, size in each)

    def _attention_options(self, curves: BlockCurves, level: BlockLevels) -> Iterator[Option[LayerSize]]:
        size, budget = level.size, self._costs.budget
        widths = [
            [kept for kept in _grid(curves[part].full, _WIDTHS) if curves[part].at(kept) < float("inf")]
            for part in (QUERIES, VALUES)
        ]
        for heads, queries, values in product(range(min(budget.min_heads, size.heads), size.heads + 1), *widths):
            narrower = curves[QUERIES].at(queries) + curves[VALUES].at(values)
            expected = curves[HEADS].at(heads) + narrower * heads / size.heads
            yield self._attention(sized(size, heads=heads, query_width=queries, value_width=values), expected)

    def _neuron_options(self, curves: BlockCurves, level: BlockLevels) -> Iterator[Option[LayerSize]]:
        for neurons in self._neuron_grid(level.size.neurons):
            yield self._neurons(sized(level.size, neurons=neurons), curves[NEURONS].at(neurons))

    def _neuron_grid(self, full: int) -> list[int]:
        budget = self._costs.budget
        step = budget.round_to * max(1, round(full / _STEPS / budget.round_to))
        least = -(-min(budget.min_neurons, full) // budget.round_to) * budget.round_to
        return sorted(
            {max(least, kept) for kept in range(step, full + 1, step)} | {full // budget.round_to * budget.round_to}
        )

    def _attention(self, size: LayerSize, damage: float) -> Option[LayerSize]:
        return Option(self._costs.of_attention(size), damage, size)

    def _neurons(self, size: LayerSize, damage: float) -> Option[LayerSize]:
        return Option(self._costs.of_neurons(size), damage, size)

    def _joined(self, chosen: Sequence[LayerSize]) -> list[LayerSize]:
        """Attention of one, feed-forward of the next: the sizes of blocks."""
        return [
            sized(attention, neurons=feed_forward.neurons)
            for attention, feed_forward in zip(chosen[::2], chosen[1::2], strict=True)
        ]

    def _improve(self, sizes: list[LayerSize]) -> Found:
        """Change what measurably helps, several parts at once, as long as that is worth the time."""
        time, step, sweeps, first = self._time(), 0.25, 0, sizes
        least = self._measured(sizes)
        self._say(f"measured divergence {least:.5f}")
        while step >= _SMALLEST_STEP and not self._is_over(time):
            groups = self._neighbours(sizes, least, step)
            found = self._attempt(groups, sizes, least)
            sweeps += 1
            if found is None:
                step /= 2
                continue
            before, (sizes, least) = least, found
            self._say(f"round {sweeps}: divergence {least:.5f}")
            if least > before * (1 - _WORTHWHILE):
                break
        return Found(sizes, least, first, cut_short=self._cut_short)

    def _attempt(
        self, groups: Sequence[Sequence[Option[LayerSize]]], sizes: list[LayerSize], least: float
    ) -> tuple[list[LayerSize], float] | None:
        """The best combination of measured changes, with fewer of them as long as they do not add up."""
        for caution in _CAUTION:
            chosen = self._joined(choose(wary(groups, caution * least), self._allowance)[0])
            if chosen == sizes:
                continue
            damage = self._measured(chosen)
            if damage < least * (1 - _GAIN):
                return chosen, damage
        return None

    def _neighbours(self, sizes: Sequence[LayerSize], least: float, step: float) -> list[list[Option[LayerSize]]]:
        """What single changes add to the damage of the model as it is; the first of each group is no change."""
        blocks = self._build(sizes)
        self._damage.enter(blocks)
        groups = []
        for index, size in enumerate(sizes):

            def added(changed: LayerSize, index: int = index) -> float:
                def measure() -> float:
                    block = self._levels[index].build(changed).block
                    return self._damage.of([*blocks[:index], block, *blocks[index + 1 :]], index)

                plan = [*sizes[:index], changed, *sizes[index + 1 :]]
                return self._values.value(self._name(plan, f"from {index}"), measure) - least

            attention = [self._attention(size, 0.0)]
            attention += [self._attention(one, added(one)) for one in self._attention_changes(index, size)]
            feed_forward = [self._neurons(size, 0.0)]
            feed_forward += [self._neurons(one, added(one)) for one in self._neuron_changes(index, size, step)]
            groups += [attention, feed_forward]
        return groups

    def _attention_changes(self, index: int, size: LayerSize) -> Iterator[LayerSize]:
        full, curves = self._levels[index].size, self._curves[index]
        for heads in (size.heads - 1, size.heads + 1):
            if self._costs.budget.min_heads <= heads <= full.heads:
                yield sized(size, heads=heads)
        for part in (QUERIES, VALUES):
            grid = _grid(curves[part].full, _WIDTHS)
            place = grid.index(getattr(size, part))
            for other in (place - 2, place + 2):
                if 0 <= other < len(grid) and curves[part].at(grid[other]) < float("inf"):
                    yield sized(size, **{part: grid[other]})

    def _neuron_changes(self, index: int, size: LayerSize, step: float) -> Iterator[LayerSize]:
        grid = self._neuron_grid(self._levels[index].size.neurons)
        wanted = [size.neurons / (1 + step), size.neurons * (1 + step)]
        nearest = {min(grid, key=lambda kept: abs(kept - neurons)) for neurons in wanted}
        for neurons in sorted(nearest - {size.neurons}):
            yield sized(size, neurons=neurons)

    def _measured(self, sizes: Sequence[LayerSize]) -> float:
        return self._values.value(self._name(sizes), lambda: self._damage.of(self._build(sizes)))

    def _name(self, sizes: Sequence[LayerSize], more: str = "") -> str:
        """Of a measured value; long lists of sizes are known by their digest."""
        digest = hashlib.blake2b(repr(list(sizes)).encode(), digest_size=8).hexdigest()
        return f"search, {name_of(self._costs.budget)}, {digest} {more}"

    def _time(self) -> Allowance:
        """What the search may take, what an interrupted run took for what is taken up from it included."""
        return Allowance(self._seconds, lambda: self._values.spared)

    def _is_over(self, time: Allowance) -> bool:
        over = self._workers.broadcast(time.is_used())
        if over and self._seconds:
            self._cut_short = True
            self._say(time.cut_short())
        return over

    def _build(self, sizes: Sequence[LayerSize]) -> list[nn.Module]:
        return [level.build(size).block for level, size in zip(self._levels, sizes, strict=True)]


def _grid(full: int, points: int) -> list[int]:
    """Sizes up to a full one, evenly spaced, the full one among them."""
    step = max(1, full // points)
    return sorted({*range(step, full, step), full})
