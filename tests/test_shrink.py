"""The parts of the method ``shrink`` against oracles, and what the whole of it promises."""

import warnings
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from shrinkformer.architectures import layer_views
from shrinkformer.efficiency.macs import count_matmul_macs, model_macs
from shrinkformer.errors import BudgetError
from shrinkformer.prune.budget import Budget, CostModel, layer_sizes
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.cholesky import DampingWarning
from shrinkformer.prune.curves import Curve, sized
from shrinkformer.prune.damage import Damage
from shrinkformer.prune.divergence import Judge, Target
from shrinkformer.prune.groups import elimination_order
from shrinkformer.prune.knapsack import Option, choose, frontier
from shrinkformer.prune.levels import BlockLevels
from shrinkformer.prune.objective import objective_of
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.projections import Projected, fold_projected, matching_bases, value_basis
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.regression import Sums, ridge_regression
from shrinkformer.prune.samples import hold_out, spread
from shrinkformer.prune.search import Found, Search
from shrinkformer.prune.sensitivity import ATTENTION, _weights, learn_sensitivity
from shrinkformer.prune.sequential import RefitErrors
from shrinkformer.prune.shrink import Shrinker, learn
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.stream import count_tokens
from shrinkformer.utils.parallel import ALONE
from tests.conftest import FAMILIES, build_model, make_batches
from tests.test_architectures import outputs

BATCHES = make_batches([3 + index % 18 for index in range(64)], batch_size=16)
QUICK = ShrinkConfig(search_seconds=0)


def rows(seed: int, tokens: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix


class TestKnapsack:
    def test_is_the_best_of_all_combinations(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(50):
            groups = [[Option(float(c), float(d), (c, d)) for c, d in rng.integers(1, 30, (4, 2))] for _ in range(4)]
            budget = float(rng.integers(30, 80))
            fitting = [combo for combo in product(*groups) if sum(one.cost for one in combo) <= budget]
            if not fitting:
                with pytest.raises(BudgetError, match="raise mu"):
                    choose(groups, budget, bins=int(budget))
                continue
            values, damage = choose(groups, budget, bins=int(budget))
            assert damage == min(sum(one.damage for one in combo) for combo in fitting)
            assert sum(cost for cost, _ in values) <= budget
            assert damage == choose([frontier(group) for group in groups], budget, bins=int(budget))[1]

    def test_never_exceeds_the_budget_on_a_coarse_grid(self) -> None:
        groups = [[Option(1.0, 1.0, 1.0), Option(1.99, 0.0, 1.99)] for _ in range(5)]
        values, _ = choose(groups, 9.0, bins=10)
        assert sum(values) <= 9.0


class TestRegression:
    def fit(self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, prior: torch.Tensor, **options: Any) -> Any:
        halves = [Sums(x.shape[1], y.shape[1], x.device) for _ in range(2)]
        cut = len(x) // 2
        halves[0].update(x[:cut], y[:cut], w[:cut])
        halves[1].update(x[cut:], y[cut:], w[cut:])
        return ridge_regression(halves, prior, **options)

    def test_agrees_with_weighted_least_squares(self) -> None:
        x, w = rows(0, 400, 6), torch.rand(400, dtype=torch.float64) + 0.1
        truth = rows(1, 6, 3)
        y = x @ truth + 5 + 0.01 * rows(2, 400, 3)
        found = self.fit(x, y, w, torch.zeros(6, 3), intercept=True, ridges=(1e-12,))
        ones = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1) * w.sqrt()[:, None]
        expected = torch.linalg.lstsq(ones, y * w.sqrt()[:, None]).solution
        assert torch.allclose(found.weight, expected[:-1], atol=1e-6)
        assert torch.allclose(found.bias, expected[-1], atol=1e-5)

    def test_columns_that_hardly_move_keep_their_digits(self) -> None:
        """Far from zero, float32 products have no digits left for what moves, unless sums start from an origin."""
        z, truth = rows(0, 4000, 6), rows(1, 6, 3)
        x = (z + 1e4).float()
        y = (x.double() @ truth).float()
        origin = x[:50].double().mean(0), y[:50].double().mean(0)
        halves = [Sums(6, 3, x.device, origin) for _ in range(2)]
        for half, part in zip(halves, (slice(2000), slice(2000, None)), strict=True):
            half.update(x[part], y[part], torch.ones(2000))
        found = ridge_regression(halves, torch.zeros(6, 3), intercept=True, ridges=(1e-9,))
        assert torch.allclose(found.weight, truth, rtol=1e-2, atol=1e-2)
        assert torch.allclose(x.double() @ found.weight + found.bias, y.double(), rtol=1e-4)

    def test_noise_leaves_the_prior_alone(self) -> None:
        x, prior = rows(0, 30, 20), rows(3, 20, 2)
        found = self.fit(x, x @ prior, torch.ones(30), prior, intercept=False)
        assert torch.allclose(found.weight, prior, atol=1e-9)
        noisy = x @ prior + 50 * rows(4, 30, 2)
        kept = self.fit(x, noisy, torch.ones(30), prior, intercept=False)
        assert (kept.weight - prior).norm() < 0.2 * prior.norm() or kept.ridge == float("inf")

    def test_error_is_relative(self) -> None:
        x = rows(0, 200, 5)
        assert self.fit(x, x @ rows(1, 5, 2), torch.ones(200), rows(1, 5, 2), intercept=False).error < 1e-6
        assert self.fit(x, rows(2, 200, 2), torch.ones(200), torch.zeros(5, 2), intercept=False).error > 0.8


class TestProjections:
    def test_a_full_basis_changes_nothing(self) -> None:
        z, weight = rows(0, 300, 8), rows(1, 8, 5)
        second = z.T @ z
        basis = value_basis(second, weight)
        assert basis.shape == (8, 8)
        leading = basis[:, :5]  # as many as there are outputs
        for some, bound in ((leading, 1e-6), (basis, 2e-5)):  # damping costs a share of 1e-8 for every direction
            new = fold_projected(second, Projected(torch.arange(8), [some]), weight)
            assert torch.allclose(z @ some @ new, z @ weight, atol=bound)

    def test_values_keep_the_best_subspace(self) -> None:
        """No projection of a rank has less error than the truncated decomposition of the output (Eckart, Young)."""
        z, weight = rows(0, 300, 8), rows(1, 8, 5)
        second = z.T @ z
        for rank in (1, 3):
            basis = value_basis(second, weight)[:, :rank]
            new = fold_projected(second, Projected(torch.arange(8), [basis]), weight)
            error = (z @ weight - z @ basis @ new).norm()
            values = torch.linalg.svdvals(z @ weight)
            assert float(error) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-4)

    def test_scores_are_kept_by_a_full_basis_and_best_by_a_short_one(self) -> None:
        queries, keys = rows(0, 200, 6), rows(1, 150, 6)
        left, right = matching_bases(queries.T @ queries, keys.T @ keys)
        scores = queries @ keys.T
        assert torch.allclose(queries @ left @ (keys @ right).T, scores, atol=1e-6 * float(scores.abs().max()))
        error = (queries @ left[:, :2] @ (keys @ right[:, :2]).T - scores).norm()
        best = torch.linalg.svdvals(scores)[2:].square().sum().sqrt()
        assert float(error) == pytest.approx(float(best), rel=1e-4)

    def test_the_least_useful_head_leaves_first(self) -> None:
        z, weight = rows(0, 400, 12), rows(1, 12, 4)
        metric = torch.diag(torch.tensor([4.0, 1.0, 1.0, 0.1], dtype=torch.float64))
        last = int(elimination_order(z.T @ z, 3, weight, metric)[-1])

        def loss(group: int) -> float:
            left = [column for column in range(12) if column // 3 != group]
            residual = z @ weight - z[:, left] @ torch.linalg.lstsq(z[:, left], z @ weight).solution
            return float(((residual @ metric) * residual).sum())

        assert last == min(range(4), key=loss)


def levels_of(model: Any, index: int = 0) -> BlockLevels:
    found = learn_levels(model)
    return found[index]


def learn_levels(model: Any) -> list[BlockLevels]:
    learnt = learn(model, BATCHES, QUICK)
    assert isinstance(learnt, Shrinker)
    return list(learnt.levels)


@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_full_sizes_give_the_dense_block(family: str) -> None:
    model = build_model(family)
    for level in learn_levels(model):
        built, dense = level.build(level.size).block.state_dict(), level.view.block.state_dict()
        assert all(torch.equal(tensor, dense[name]) for name, tensor in built.items())
        assert level.build(level.size).block is not level.view.block


@pytest.mark.parametrize("widths", [(3, 8), (8, 3), (3, 5), (4, 4)])
def test_narrow_heads_compute_what_their_projections_say(widths: tuple[int, int]) -> None:
    """A narrowed block equals a stock block whose weights are padded with zeros by hand."""
    model = build_model("bert").double()
    level = levels_of(model)
    query, value = widths
    small = level.build(sized(level.size, heads=2, query_width=query, value_width=value))
    assert (small.heads, small.query_width, small.value_width, small.head_size) == (2, query, value, max(widths))
    wide = level.build(sized(level.size, heads=2))
    attention = small.architecture.attention

    def padded(weight: torch.Tensor, width: int) -> torch.Tensor:
        return torch.nn.functional.pad(weight.reshape(2, width, -1), (0, 0, 0, 8 - width)).reshape(16, -1)

    with torch.no_grad():
        for path, width in ((attention.query, query), (attention.key, query), (attention.value, value)):
            wide.linear(path).weight.copy_(padded(small.linear(path).weight, width))
            bias = small.linear(path).bias
            wide.linear(path).bias.copy_(padded(bias[:, None], width)[:, 0])  # type: ignore[union-attr, index]
        wide.attention_output.weight.copy_(padded(small.attention_output.weight.T.contiguous(), value).T)
        hidden = torch.randn(2, 7, 32, dtype=torch.float64)
        assert torch.allclose(small.block(hidden)[0], wide.block(hidden)[0], atol=1e-12)


def test_damage_is_the_divergence_of_the_whole_model() -> None:
    model = build_model("bert")
    damage = Damage(model, BATCHES, objective_of(model))
    blocks = [view.block for view in layer_views(model)]
    assert damage.of(blocks) == damage.of(blocks, 1) == 0
    level = levels_of(model, 1)
    small = level.build(sized(level.size, neurons=3)).block
    changed = [blocks[0], small, *blocks[2:]]
    measured = damage.of(changed, 1)
    assert measured == pytest.approx(damage.of(changed), rel=1e-5)
    damage.enter(changed)
    assert damage.of(changed, len(changed) - 1) == pytest.approx(measured, rel=1e-5)
    by_hand, count = 0.0, 0
    with torch.no_grad():
        for batch in BATCHES:
            mask = batch["attention_mask"].bool()
            dense = objective_of(model).predictions(model(**batch), mask)
            model.bert.encoder.layer[1] = small
            found = objective_of(model).predictions(model(**batch), mask)
            model.bert.encoder.layer[1] = blocks[1]
            by_hand += float(Target(dense).divergence(found))
            count += len(mask)
    assert measured == pytest.approx(by_hand / count, rel=0.05)  # it passes examples in bfloat16 where that is fast


def count(batches: Any) -> int:
    return sum(len(batch["attention_mask"]) for batch in batches)


def test_some_examples_come_from_everywhere() -> None:
    marked = [{**batch, "number": torch.arange(16) + 16 * index} for index, batch in enumerate(BATCHES)]
    total = count_tokens(marked)
    some = spread(marked, total // 4)
    numbers = torch.cat([batch["number"] for batch in some]).tolist()
    assert numbers == list(range(3, 64, 4))
    assert count_tokens(some) == pytest.approx(total / 4, rel=0.2)
    assert count(spread(marked, 1)) == 1
    assert all(one is other for one, other in zip(spread(marked, total), marked, strict=True))


def test_examples_set_aside_are_used_for_nothing_else() -> None:
    marked = [{**batch, "number": torch.arange(16) + 16 * index} for index, batch in enumerate(BATCHES)]
    kept, aside = hold_out(marked)
    assert count(aside) == 8
    everything = torch.cat([batch["number"] for batch in [*kept, *aside]]).tolist()
    assert sorted(everything) == list(range(64))
    few = [marked[0]]
    assert hold_out(few) == (few, few)


def test_the_judge_agrees_with_the_damage_of_blocks() -> None:
    model = build_model("bert")
    pruned = prune_model(model, BATCHES, mu=0.5, method="stat")
    measured = Damage(model, BATCHES, objective_of(model)).of([view.block for view in layer_views(pruned.model)])
    judge = Judge(model, BATCHES, objective_of(model))
    assert judge.of(model) == 0
    assert judge.of(pruned.model) == pytest.approx(measured, rel=1e-4)


def test_what_is_nearer_to_the_dense_model_wins() -> None:
    learnt = learn(build_model("bert", initializer_range=0.3), BATCHES, QUICK)
    budget = Budget(0.5, 16.0)
    pruned = learnt.prune(budget)
    assert set(pruned.plan.divergences) == {"shrink", "stat"}  # no search, so there is no other plan of ours
    assert pruned.plan.divergences["stat"] == pytest.approx(learnt.judge.of(learnt.rival.prune(budget).model))
    assert 0 < learnt.judge.of(pruned.model) < pruned.plan.divergences["shrink"]  # those examples help in the end
    assert pruned.plan.method == "shrink"
    with mock.patch("shrinkformer.prune.shrink.refit_blocks", spoil):
        rescued = learnt.prune(budget)
    assert rescued.plan.method == "stat"
    assert rescued.plan.divergences["stat"] == pruned.plan.divergences["stat"] < rescued.plan.divergences["shrink"]
    assert rescued.plan.ratio <= 0.5


def test_a_search_that_went_astray_costs_nothing() -> None:
    learnt = learn(build_model("bert"), BATCHES, QUICK)
    expected = learnt.prune(Budget(0.5, 16.0))

    def astray(search: Search) -> Found:
        found = FIRST_PLAN(search)
        return replace(found, sizes=[replace(size, neurons=1) for size in found.sizes])

    with mock.patch.object(Search, "run", astray):
        pruned = learnt.prune(Budget(0.5, 16.0))
    assert set(pruned.plan.divergences) == {"shrink", "shrink, first plan", "stat"}
    assert pruned.plan.divergences["shrink"] > pruned.plan.divergences["shrink, first plan"]
    assert (pruned.plan.method, pruned.plan.layers) == ("shrink", expected.plan.layers)


FIRST_PLAN = Search.run


def spoil(model: Any, blocks: Any, *_: Any, **__: Any) -> list[RefitErrors]:
    for view in blocks:
        torch.nn.init.normal_(view.feed_forward_output.weight, std=10)
    return [RefitErrors(1.0, 1.0) for _ in blocks]


def test_tokens_count_by_the_root_where_few_hold_the_sum() -> None:
    even, few = torch.linspace(0.5, 1.5, 100), torch.full((100,), 1e-4)
    few[:3] = 1.0
    roots = [torch.cat([((part / part.mean()).sqrt() + 0.3) / 1.3]) for part in (even, few)]
    assert torch.allclose(torch.cat(_weights([even[:40], even[40:]], ALONE)), roots[0].square())
    assert torch.allclose(torch.cat(_weights([few], ALONE)), roots[1])
    assert torch.equal(torch.cat(_weights([torch.zeros(5)], ALONE)), torch.ones(5))


def test_sensitivity_knows_what_a_classifier_reads() -> None:
    """In the last block of a classifier only the first token of an example counts."""
    model = build_model("bert")
    found = learn_sensitivity(model, BATCHES, objective=objective_of(model))
    last = len(layer_views(model)) - 1
    weights = found.tokens[last, ATTENTION][0]
    lengths = BATCHES[0]["attention_mask"].sum(1)
    first = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
    others = torch.ones(len(weights), dtype=torch.bool)
    others[first] = False
    assert float(weights[first].min()) > float(weights[others].max())
    assert float(found.metrics[last, ATTENTION].diagonal().mean()) == pytest.approx(1)


def test_curves_fall_and_end_at_zero() -> None:
    curve = Curve((2, 4, 8), (0.4, 0.1, 0.02), 16)
    values = [curve.at(kept) for kept in range(1, 17)]
    assert values == sorted(values, reverse=True)
    assert curve.at(4) == pytest.approx(0.1)
    assert curve.at(16) == 0
    assert Curve((), (), 16).at(15) == float("inf")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_saved_and_loaded(family: str, tmp_path: Any) -> None:
    model = build_model(family)
    pruned = prune_model(model, BATCHES, mu=0.45, method="shrink", sequence_length=16, config=QUICK)
    assert 0.4 < pruned.plan.ratio <= 0.45
    batch = make_batches([16], batch_size=1)[0]
    assert count_matmul_macs(pruned.model, batch) == pytest.approx(pruned.plan.macs)
    assert Plan.from_json(pruned.plan.to_json()) == pruned.plan
    save(pruned.model, tmp_path / "small", plan=pruned.plan)
    for attention in ("eager", "sdpa"):
        pruned.model.set_attn_implementation(attention)
        reloaded = load(tmp_path / "small", attn_implementation=attention).eval()
        assert torch.equal(outputs(reloaded, BATCHES[0]), outputs(pruned.model, BATCHES[0]))
    assert layer_sizes(layer_views(reloaded)) == layer_sizes(layer_views(pruned.model))


def test_heads_may_be_wider_than_the_model() -> None:
    model = build_model("llama", head_dim=80)
    learnt = learn(model, BATCHES, QUICK)
    full = learnt.levels[0].size
    narrow = learnt.levels[0].build(sized(full, value_width=72))
    assert (narrow.query_width, narrow.value_width) == (full.query_width, 72)
    pruned = learnt.prune(Budget(0.5, 16.0))
    assert 0.45 < pruned.plan.ratio <= 0.5


def test_whole_heads_keep_their_width() -> None:
    config = ShrinkConfig(whole_heads=True, search_seconds=1)
    pruned = prune_model(build_model(), BATCHES, mu=0.4, method="shrink", config=config)
    assert all(view.query_width == view.value_width == 8 for view in layer_views(pruned.model))
    assert all(layer.value_width == 0 for layer in pruned.plan.layers)


def test_the_search_lowers_what_it_measures_within_the_budget() -> None:
    learnt = learn(build_model("bert", initializer_range=0.3), BATCHES, QUICK)
    costs = CostModel.of([level.view for level in learnt.levels], Budget(0.4, 16.0))
    first, last = (
        Search(learnt.levels, learnt.curves, learnt.damage, costs, seconds=seconds).run() for seconds in (0, 30)
    )
    assert last.damage < first.damage
    assert 0.38 * costs.dense < model_macs(last.sizes, 32, 16.0) <= 0.4 * costs.dense
    again = learnt.damage.of([level.build(size).block for level, size in zip(learnt.levels, last.sizes, strict=True)])
    assert again == pytest.approx(last.damage, rel=1e-5)


def test_predictions_stay_nearer_than_with_stat() -> None:
    model = build_model("bert", initializer_range=0.3)
    measure = Damage(model, make_batches([3 + index % 18 for index in range(256)], batch_size=64), objective_of(model))

    def left(method: str) -> float:
        found = prune_model(model, BATCHES, mu=0.4, method=method, sequence_length=16.0)
        return measure.of([view.block for view in layer_views(found.model)])

    assert left("shrink") < 0.8 * left("stat")


def test_a_handful_of_distinct_tokens_is_ordinary_input() -> None:
    model = build_model(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    few = make_batches([5, 6, 4, 7], batch_size=4)[0]
    batches = [{name: value.repeat(4, 1) for name, value in few.items()} for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        pruned = prune_model(model, batches, mu=0.5)
    assert pruned.plan.ratio <= 0.5
    assert pruned.plan.divergences["shrink"] < 1e-3


def test_a_fold_of_narrowed_heads_survives_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, mix = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((500, 6), (6, 64)))
    tokens = tokens @ mix
    second = (tokens.float().T @ tokens.float()).double()  # rank 6, and rounding of single precision elsewhere
    weight = torch.randn(64, 10, generator=generator, dtype=torch.float64)
    parts = torch.arange(64).chunk(2)
    bases = [value_basis(second[part][:, part], weight[part])[:, :20] for part in parts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        folded = fold_projected(second, Projected(torch.arange(64), bases), weight)
    wanted = tokens @ weight
    found = tokens @ torch.block_diag(*bases) @ folded
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
