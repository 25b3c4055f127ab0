"""The methods that others published, against oracles."""

from typing import Any

import numpy as np
import pytest
import torch

from shrinkformer.architectures import LayerView, layer_views, unit_columns
from shrinkformer.prune.allocation import allocate_at_threshold
from shrinkformer.prune.budget import Budget, CostModel
from shrinkformer.prune.elimination import eliminate
from shrinkformer.prune.methods import METHODS, LayerRanking, _per_output, get_method
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.refit import Correction, correct_consumer
from tests.conftest import build_model, make_batches
from tests.matrices import gelu, gram, normal, squared

BATCHES = make_batches([3 + index % 18 for index in range(48)], batch_size=8)


def columns_of(groups: list[int], size: int) -> torch.Tensor:
    return unit_columns(torch.tensor(groups, dtype=torch.long), size)


def refit_loss(z: torch.Tensor, weight: torch.Tensor, groups: list[int], size: int) -> float:
    """Squared error of the output ``z weight`` when only some groups of columns make it."""
    kept = z[:, columns_of(groups, size)]
    return squared(z @ weight - kept @ torch.linalg.lstsq(kept, z @ weight).solution)


def moments_of(rows: torch.Tensor) -> Moments:
    moments = Moments.zeros(rows.shape[1])
    moments.update(rows)
    return moments


class TestElimination:
    @pytest.mark.parametrize("size", [1, 3])
    def test_every_step_is_the_best_one(self, size: int) -> None:
        z, weight = gelu(200, 12, seed=3), normal(12, 4, seed=4)
        found = eliminate(gram(z), weight, size)
        left = list(range(12 // size))
        for count in range(len(left), 1, -1):
            losses = {gone: refit_loss(z, weight, [one for one in left if one != gone], size) for gone in left}
            gone = min(left, key=lambda one: losses[one])
            assert int(found.order[count - 1]) == gone
            assert float(found.losses[count - 1]) == pytest.approx(losses[gone], rel=1e-4)
            left.remove(gone)
        assert float(found.losses[0]) == pytest.approx(squared(z @ weight), rel=1e-6)
        assert float(found.losses[-1]) == 0

    def test_blocks_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        z, weight = gelu(400, 150), normal(150, 20)
        found = eliminate(gram(z), weight)
        monkeypatch.setattr("shrinkformer.prune.elimination._BLOCK", 1)
        alone = eliminate(gram(z), weight)
        assert torch.equal(found.order, alone.order)
        torch.testing.assert_close(found.losses, alone.losses, rtol=1e-6, atol=0)

    def test_dead_and_double_columns_leave_first(self) -> None:
        z = normal(100, 8)
        z[:, 2] = 0
        z[:, 5] = 2 * z[:, 1]
        found = eliminate(gram(z), normal(8, 3, seed=1))
        assert 2 in found.order[-2:].tolist()
        assert {1, 5} & set(found.order[-2:].tolist())
        assert float(found.losses[6]) < 1e-4 * float(found.losses[0])


class TestScores:
    """On layers whose weights and inputs are written down here."""

    def view(self) -> LayerView:
        model = build_model("bert", hidden_size=8, intermediate_size=6).double().requires_grad_(False)
        view = layer_views(model)[0]
        view.feed_forward_output.weight.copy_(normal(8, 6))
        view.attention_output.weight.copy_(normal(8, 8, seed=1))
        return view

    @pytest.mark.parametrize("method", ["wanda", "flap"])
    def test_by_hand(self, method: str) -> None:
        view, rows = self.view(), {8: normal(50, 8, seed=2) + 1, 6: normal(50, 6, seed=3) - 2}
        for width, linear in ((8, view.attention_output), (6, view.feed_forward_output)):
            z, weight = rows[width].numpy(), linear.weight.numpy()
            score = np.abs(weight).sum(0) * np.linalg.norm(z, axis=0)
            if method == "flap":
                score = z.var(axis=0) * np.square(weight).sum(0)
                score = (score - score.mean()) / score.std(ddof=1)
            chosen = get_method(method)
            if width == 8:
                pairs = score.reshape(4, 2)
                expected = pairs.sum(1) if method == "wanda" else pairs.mean(1)
                found = chosen.rank_heads(view, moments_of(rows[width]), 0)
            else:
                expected, found = score, chosen.rank_neurons(view, moments_of(rows[width]), 0)
            np.testing.assert_array_equal(found.order, np.argsort(-expected))
            np.testing.assert_allclose(found.scores, np.sort(expected)[::-1], rtol=1e-9)

    def test_the_bias_takes_over_the_mean(self) -> None:
        view, z = self.view(), normal(50, 6, seed=3) - 2
        linear, kept = view.feed_forward_output, torch.tensor([0, 3, 4])
        found = correct_consumer(linear, moments_of(z), kept, Correction.BIAS)
        assert torch.equal(found.weight, linear.weight[:, kept])
        assert found.bias is not None
        before, after = linear.module(z), z[:, kept] @ found.weight.T + found.bias
        assert torch.allclose(before.mean(0), after.mean(0))
        spread = before - before.mean(0)
        assert found.error == pytest.approx(float((before - after).norm() / spread.norm()), rel=1e-6)

    def test_without_a_bias_nothing_takes_over(self) -> None:
        view = layer_views(build_model("llama"))[0]
        kept = torch.arange(10)
        found = correct_consumer(view.feed_forward_output, moments_of(normal(90, 64)), kept, Correction.BIAS)
        assert found.bias is None
        assert torch.equal(found.weight, view.feed_forward_output.weight[:, kept])


class TestThreshold:
    def costs(self, mu: float, **limits: int) -> CostModel:
        return CostModel.of(layer_views(build_model()), Budget(mu, 16.0, **limits))

    def scores(self, seed: int) -> tuple[list[Any], list[Any]]:
        rng = np.random.default_rng(seed)
        return tuple([-np.sort(-rng.random(size)) for _ in range(3)] for size in (4, 64))  # type: ignore[return-value]

    @pytest.mark.parametrize("mu", [0.25, 0.5, 0.9])
    def test_what_stays_is_better_than_what_goes(self, mu: float) -> None:
        for seed in range(5):
            heads, neurons = self.scores(seed)
            costs = self.costs(mu)
            counts = allocate_at_threshold(costs, heads, neurons)
            assert mu * costs.dense - 1.01 * costs.neuron < costs.macs(counts) <= mu * costs.dense
            sizes = list(zip(heads + neurons, counts.heads + counts.neurons, strict=True))
            worst_neuron = min(score[kept - 1] for score, kept in sizes[3:] if kept > 1)
            assert all(score[kept - 1] >= worst_neuron for score, kept in sizes[:3] if kept > 1)
            assert all(score[kept] <= worst_neuron for score, kept in sizes[3:] if kept < 64)

    def test_settled_blocks_stay_as_they_are(self) -> None:
        heads, neurons = self.scores(0)
        heads[0], neurons[0] = np.full(2, np.inf), np.full(8, np.inf)
        counts = allocate_at_threshold(self.costs(0.4), heads, neurons)
        assert (counts.heads[0], counts.neurons[0]) == (2, 8)

    def test_floors_and_rounding(self) -> None:
        heads, neurons = self.scores(0)
        costs = self.costs(0.4, round_to=8, min_heads=2, min_neurons=10)
        counts = allocate_at_threshold(costs, [scores * 1e-9 for scores in heads], neurons)
        assert counts.heads == (2, 2, 2)
        assert all(count % 8 == 0 and count >= 16 for count in counts.neurons)


@pytest.mark.parametrize("method", [name for name in METHODS if name in {"obs", "flap", "wanda", "wanda-refit"}])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_they_work_for_decoders(method: str, family: str) -> None:
    pruned = prune_model(build_model(family), BATCHES, mu=0.5, method=method, sequence_length=16)
    assert 0.49 < pruned.plan.ratio <= 0.5
    assert all(0 < layer.ffn_error < 1.5 for layer in pruned.plan.layers if len(layer.neurons) < 64)


def test_obs_loses_less_than_other_uniform_choices() -> None:
    model = build_model().double()
    views = layer_views(model)
    errors = {
        name: [layer.ffn_error for layer in prune_model(model, BATCHES, mu=0.5, method=name).plan.layers]
        for name in ("obs", "wanda-refit", "wanda")
    }
    assert len(errors["obs"]) == len(views)
    assert sum(errors["obs"]) < sum(errors["wanda-refit"]) < sum(errors["wanda"])


def test_flap_prefers_no_sublayer() -> None:
    """Scores are standardised in each sublayer: a block with activations a thousand times larger loses as much."""
    method, model = get_method("flap"), build_model().requires_grad_(False)
    views = layer_views(model)
    costs = CostModel.of(views, Budget(0.5, 16.0))

    def counts(scale: float) -> Any:
        rankings = [
            LayerRanking(
                method.rank_heads(view, moments_of(normal(90, 32, seed=view.index) * factor), 0),
                method.rank_neurons(view, moments_of(normal(90, 64, seed=view.index) * factor), 0),
            )
            for view, factor in zip(views, (1.0, scale, 1.0), strict=True)
        ]
        return method.allocate(rankings, costs)

    assert counts(1.0) == counts(1000.0)


def test_blocks_of_zeros_say_nothing_about_the_depth_of_others() -> None:
    alive, dead = np.array([4.0, 2.0]), np.zeros(2)
    found = _per_output([dead, alive, 2 * alive, dead])
    assert np.allclose(found, [dead, alive / 4, alive / 4, dead])
    assert np.array_equal(_per_output([dead]), [dead])
    assert np.allclose(_per_output([dead, alive]), [dead, alive / 4])
