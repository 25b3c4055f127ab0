"""The budget: exact, never exceeded, and every block keeps what it needs."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import BudgetError, InputError
from shrinkformer.prune.allocation import allocate_globally, allocate_uniformly, require_feasible
from shrinkformer.prune.budget import Budget, CostModel, Counts


def cost_model(budget: Budget, *, layers: int = 3, heads: int = 6, neurons: int = 96) -> CostModel:
    return CostModel((LayerSize(heads, 8, neurons),) * layers, 48, budget)


def decreasing(rng: np.random.Generator, size: int) -> Any:
    return np.sort(rng.exponential(size=size))[::-1]


def allocate(costs: CostModel, seed: int = 0) -> Counts:
    rng = np.random.default_rng(seed)
    heads = [decreasing(rng, layer.heads) for layer in costs.layers]
    neurons = [decreasing(rng, layer.neurons) for layer in costs.layers]
    tails = [np.sqrt(np.append(np.cumsum(score[::-1] ** 2)[::-1], 0.0)) for score in neurons]
    return allocate_globally(costs, heads, neurons, tails, trade=2.0)


@settings(max_examples=150, deadline=None)
@given(
    mu=st.floats(0.15, 1.0),
    length=st.floats(3.0, 600.0),
    round_to=st.sampled_from([1, 8, 32]),
    seed=st.integers(0, 1000),
)
def test_never_above_and_close_below(mu: float, length: float, round_to: int, seed: int) -> None:
    costs = cost_model(Budget(mu, length, round_to))
    try:
        results = [allocate(costs, seed), allocate_uniformly(costs)]
    except BudgetError:
        return
    for counts in results:
        ratio = costs.macs(counts) / costs.dense
        assert ratio <= mu
        everything = counts.neurons == (96, 96, 96)
        assert everything or ratio > mu - costs.neuron * round_to / costs.dense * 1.001
        assert all(kept % round_to == 0 and kept >= round_to for kept in counts.neurons)
        assert all(1 <= kept <= 6 for kept in counts.heads)


def test_everything_stays_at_one() -> None:
    counts = allocate(cost_model(Budget(1.0, 20)))
    assert counts == Counts((6, 6, 6), (96, 96, 96))


def test_floors_hold() -> None:
    counts = allocate(cost_model(Budget(0.4, 20, 8, min_heads=2, min_neurons=20)))
    assert min(counts.heads) >= 2
    assert min(counts.neurons) >= 24


def test_uniform_is_uniform() -> None:
    counts = allocate_uniformly(cost_model(Budget(0.5, 20)))
    assert max(counts.heads) - min(counts.heads) <= 1
    assert max(counts.neurons) - min(counts.neurons) <= 1


def test_impossible_budget_says_what_is_possible() -> None:
    with pytest.raises(BudgetError, match=r"--mu 0.01 cannot be met.*takes mu 0\.\d+.*raise --mu"):
        require_feasible(cost_model(Budget(0.01, 20)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 10), r"--mu 0.0: must be in \(0, 1\]"),
        ((1.5, 10), r"--mu 1.5: must be in \(0, 1\]"),
        ((float("nan"), 10), r"--mu nan: must be in \(0, 1\]"),
        ((0.5, 0), r"--sequence_length 0: must be positive"),
        ((0.5, 10, 0), r"--round_to 0: must be at least 1"),
        ((0.5, 10, 1, 0), r"--min_heads 0: must be at least 1"),
    ],
)
def test_bad_budgets(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(*arguments)


def test_round_to_wider_than_a_block() -> None:
    with pytest.raises(InputError, match="--round_to 128: a block has only 96 neurons"):
        allocate(cost_model(Budget(0.5, 20, 128)))


@pytest.mark.parametrize("widths", [(2, 8), (8, 2)])
def test_heads_of_different_widths_are_counted_as_what_they_are(widths: tuple[int, int]) -> None:
    """A model that was pruned before may have narrower heads in one block than in the next."""
    layers = tuple(LayerSize(6, width, 96, query_width=width, value_width=width) for width in widths)
    for mu in (0.9, 0.5, 0.1):
        costs = CostModel(layers, 48, Budget(mu, 20))
        for counts in (allocate(costs), allocate_uniformly(costs)):
            everything = counts.neurons == (96, 96)
            assert mu - 1.01 * costs.neuron / costs.dense < costs.macs(counts) / costs.dense <= mu or everything
            assert costs.macs(counts) <= mu * costs.dense
    least = CostModel(layers, 48, Budget(1.0, 20))
    share = least.macs(Counts((1, 1), (1, 1))) / least.dense
    require_feasible(CostModel(layers, 48, Budget(share * 1.0001, 20)))
    with pytest.raises(BudgetError, match=f"takes mu {share:.4f}"):
        require_feasible(CostModel(layers, 48, Budget(share * 0.9999, 20)))
