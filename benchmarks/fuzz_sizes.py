"""Allocation alone, without a model: never above a budget, and as good as brute force where everything can be tried."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import BudgetError, InputError
from shrinkformer.prune.allocation import (
    allocate_at_threshold,
    allocate_for_most,
    allocate_globally,
    allocate_uniformly,
)
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.knapsack import Option, choose, frontier
from shrinkformer.prune.uniform import Losses, allocate_alike

Scores = list[NDArray[np.float64]]


def check_sizes(data: st.DataObject, family: str) -> str:
    """One knapsack or one allocation."""
    del family
    return _check_knapsack(data) if data.draw(st.booleans(), "knapsack") else _check_allocation(data)


def _check_knapsack(data: st.DataObject) -> str:
    numbers = st.floats(0, 9) | st.integers(0, 9).map(float) | st.floats(0, 1e-9)
    pair = st.tuples(numbers, numbers)
    drawn = data.draw(st.lists(st.lists(pair, min_size=1, max_size=4), min_size=1, max_size=4), "groups")
    groups = [[Option(cost, damage, (g, i)) for i, (cost, damage) in enumerate(group)] for g, group in enumerate(drawn)]
    budget = data.draw(st.floats(0.01, 40), "budget")
    choices = list(product(*groups))

    def best(within: float) -> float:
        return min(
            (sum(one.damage for one in choice) for choice in choices if sum(one.cost for one in choice) <= within),
            default=float("inf"),
        )

    try:
        values, damage = choose([frontier(group) for group in groups], budget)
    except BudgetError:
        assert best(budget * (1 - 1.01 * len(groups) / 20_000)) == float("inf")
        return "knapsack: refused"
    chosen = [groups[g][i] for g, i in values]
    assert sum(one.cost for one in chosen) <= budget * (1 + 1e-9)
    assert abs(sum(one.damage for one in chosen) - damage) <= 1e-9 * (1 + damage)
    assert best(budget * (1 + 1e-9)) <= damage + 1e-9 * (1 + damage)
    assert damage <= best(budget * (1 - 1.01 * len(groups) / 20_000)) + 1e-9 * (1 + damage)  # of the grid
    return "knapsack: chosen"


def _draw_costs(data: st.DataObject) -> CostModel:
    queries = data.draw(st.integers(1, 3), "queries")
    count = data.draw(st.integers(1, 3), "blocks")
    gated = data.draw(st.booleans(), "gated")
    each = st.tuples(st.integers(1, 4), st.integers(1, 12))
    widths = data.draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=count, max_size=count))
    alike = data.draw(st.booleans(), "widths alike")
    layers = []
    for index, (heads, neurons) in enumerate(
        data.draw(st.lists(each, min_size=count, max_size=count), "blocks' sizes")
    ):
        query, value = widths[0 if alike else index]
        layers.append(LayerSize(heads, max(query, value), neurons, gated, queries, query, value))
    budget = Budget(
        data.draw(st.floats(0.01, 1.0) | st.just(1.0), "mu"),
        data.draw(st.floats(0.5, 600), "length"),
        data.draw(st.integers(1, 4), "round_to"),
        data.draw(st.integers(1, 4), "min_heads"),
        data.draw(st.integers(1, 12), "min_neurons"),
    )
    fewest = min(layer.heads for layer in layers)
    return CostModel(tuple(layers), data.draw(st.integers(1, 64)), budget, head_counts=tuple(range(1, fewest + 1)))


def _every(costs: CostModel) -> list[Counts]:
    """All sizes that hold the floors, whatever they cost."""
    budget = costs.budget
    heads = [range(min(budget.min_heads, layer.heads), layer.heads + 1) for layer in costs.layers]
    neurons = []
    for layer in costs.layers:
        whole = layer.neurons // budget.round_to * budget.round_to
        least = min(-(-budget.min_neurons // budget.round_to) * budget.round_to, whole)
        neurons.append(range(least, whole + 1, budget.round_to))
    return [Counts(h, n) for h in product(*heads) for n in product(*neurons)] if len(costs.layers) < 3 else []


def _check_allocation(data: st.DataObject) -> str:
    costs = _draw_costs(data)
    kind = data.draw(st.sampled_from(["global", "uniform", "threshold", "most", "alike"]), "kind")
    rng = np.random.default_rng(data.draw(st.integers(0, 9999), "scores"))
    ties = data.draw(st.booleans(), "ties")
    heads = _decreasing(rng, [layer.heads for layer in costs.layers], ties)
    neurons = _decreasing(rng, [layer.neurons for layer in costs.layers], ties)
    within = [counts for counts in _every(costs) if costs.macs(counts) <= costs.budget.mu * costs.dense * (1 - 1e-11)]
    if kind == "alike":
        within = [counts for counts in within if len(set(counts.heads)) == len(set(counts.neurons)) == 1]
    try:
        counts = _allocate(kind, costs, heads, neurons)
    except (BudgetError, InputError):
        wide = costs.budget.round_to > min(layer.neurons for layer in costs.layers)
        assert wide or not within, "refused what is possible"
        return f"{kind}: refused"
    assert costs.macs(counts) <= costs.budget.mu * costs.dense
    fewest = min(layer.heads for layer in costs.layers)  # more cannot be had where all are alike
    for kept, layer in zip(counts.heads, costs.layers, strict=True):
        assert kept >= min(costs.budget.min_heads, fewest if kind == "alike" else layer.heads)
    assert all(kept % costs.budget.round_to == 0 for kept in counts.neurons)
    if kind == "alike" and within:
        losses = Losses(_tails(heads), _tails(neurons))
        assert losses.of(counts) <= min(map(losses.of, within)) * (1 + 1e-9) + 1e-12
    return f"{kind}: allocated"


def _allocate(kind: str, costs: CostModel, heads: Scores, neurons: Scores) -> Counts:
    match kind:
        case "global":
            return allocate_globally(costs, heads, neurons, [np.sqrt(tail) for tail in _tails(neurons)], trade=2.0)
        case "uniform":
            return allocate_uniformly(costs)
        case "threshold":
            return allocate_at_threshold(costs, heads, neurons)
        case "most":
            return allocate_for_most(costs, heads, neurons)
    return allocate_alike(costs, Losses(_tails(heads), _tails(neurons)))


def _decreasing(rng: np.random.Generator, sizes: Sequence[int], ties: bool) -> Scores:
    draws = [rng.integers(0, 3, size).astype(np.float64) if ties else rng.exponential(size=size) for size in sizes]
    return [np.sort(draw)[::-1] for draw in draws]


def _tails(scores: Scores) -> Scores:
    return [np.append(np.cumsum(score[::-1] ** 2)[::-1], 0.0) for score in scores]
