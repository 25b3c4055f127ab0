"""The methods ``kwon`` and ``kprune``: their parts against oracles, and what the whole of them promises."""

import copy
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from shrinkformer.architectures import layer_views
from shrinkformer.efficiency.macs import LayerSize, count_matmul_macs
from shrinkformer.errors import NumericalError
from shrinkformer.prune.allocation import allocate_for_most
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.divergence import Target
from shrinkformer.prune.fisher import log_likelihood
from shrinkformer.prune.kprune import Knowledge, KPrune, contributions, learn_kprune, measure, softened
from shrinkformer.prune.kwon import Kwon, learn_kwon, rearranged, unit_scales
from shrinkformer.prune.masks import Part, mask_gradients, paired_blocks, parts_of, wanted_outputs
from shrinkformer.prune.objective import Predictions, objective_of
from shrinkformer.prune.passes import watched
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.regression import Sums
from shrinkformer.utils.parallel import ALONE
from tests.conftest import FAMILIES, build_model, make_batches
from tests.matrices import normal
from tests.test_architectures import outputs

BATCHES = make_batches([3 + index % 18 for index in range(48)], batch_size=16)

each_family = pytest.mark.parametrize("family", FAMILIES)


def square_loss(output: Any, _index: int) -> torch.Tensor:
    """Of each example by itself; padding does not count, since it reaches no first token."""
    total: torch.Tensor = output[0].reshape(len(output[0]), -1)[:, :8].square().sum()
    return total


def by_scaled_weights(model: Any, part: Part, batch: dict[str, Any]) -> torch.Tensor:
    """The gradient in a mask on the consumer's columns, through weights that hold it."""
    (name,) = (name for name, module in model.named_modules() if module is part.consumer.module)
    weight = part.consumer.module.weight.detach()
    mask = torch.ones(part.units, dtype=weight.dtype, requires_grad=True)
    scales = mask.repeat_interleave(part.width)
    transposed = type(part.consumer.module).__name__ == "Conv1D"
    scaled = weight * (scales[:, None] if transposed else scales)
    output = torch.func.functional_call(model, {f"{name}.weight": scaled}, kwargs=batch)
    (found,) = torch.autograd.grad(square_loss(output, 0), mask)
    return found


@pytest.mark.parametrize("family", ["bert", "opt", "gpt2", "llama"])
def test_mask_gradients_are_those_of_scaled_weights(family: str) -> None:
    model = build_model(family).double()
    parts = parts_of(layer_views(model))
    assert [part.heads for part in parts] == [True, False] * 3
    batch = make_batches([9, 4, 6], batch_size=3)[0]
    (found,) = mask_gradients(model, parts, [batch], square_loss)
    for place, part in enumerate(parts):
        for example in range(3):
            alone = {name: value[example : example + 1] for name, value in batch.items()}
            expected = by_scaled_weights(model, part, alone)
            torch.testing.assert_close(found.masks[place][example], expected, rtol=1e-8, atol=1e-10)
        assert found.inputs[place].shape == (3, 9, part.consumer.in_features)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class TestSearch:
    def test_is_the_best_of_all(self) -> None:
        rng = np.random.default_rng(0)
        layers = tuple(LayerSize(3, 4, 5, gated=False, queries=1, query_width=4, value_width=4) for _ in range(2))
        for mu in (0.45, 0.6, 0.8):
            costs = CostModel(layers, 8, Budget(mu, 4.0))
            heads, neurons = ([-np.sort(-rng.random(size)) for _ in range(2)] for size in (3, 5))
            found = allocate_for_most(costs, heads, neurons)

            def worth(counts: Counts, scores: Any = (*heads, *neurons)) -> float:
                kept = zip(scores, counts.heads + counts.neurons, strict=True)
                return sum(float(np.square(score[:count]).sum()) for score, count in kept)

            every = (Counts(one[:2], one[2:]) for one in product(*[range(1, 4)] * 2, *[range(1, 6)] * 2))
            best = max(worth(counts) for counts in every if costs.macs(counts) <= mu * costs.dense)
            assert worth(found) == pytest.approx(best)
            assert costs.macs(found) <= mu * costs.dense

    def test_units_that_cancel_leave_together(self) -> None:
        gradients = np.array([[3.0, -3.0, 1.0, 1.5], [1.0, -1.0, 1.0, 0.5]])
        assert rearranged(gradients, np.array([0, 1])).tolist() == [2, 3]

    def test_rearranging_lowers_the_loss_and_keeps_the_count(self) -> None:
        gradients = np.asarray(normal(4, 40))
        kept = np.argsort(-np.square(gradients).sum(0))[:15]

        def loss(units: Any) -> float:
            return float(np.square(np.delete(gradients, units, axis=1).sum(1)).sum())

        found = rearranged(gradients, kept)
        assert len(set(found.tolist())) == 15
        assert loss(found) < 0.1 * loss(kept)
        assert rearranged(gradients, np.arange(40)).tolist() == list(range(40))


class TestTuning:
    @pytest.mark.parametrize("width", [1, 3])
    def test_is_damped_least_squares(self, width: int) -> None:
        x, weight, y = normal(30, 6), normal(4, 6, seed=1), normal(30, 4, seed=2)
        sums = Sums(6, 4, x.device)
        sums.update(x, y, torch.ones(30))
        found = unit_scales(sums, weight, width, damp=1.5)
        units = 6 // width
        columns = [(x[:, u * width : (u + 1) * width] @ weight[:, u * width : (u + 1) * width].T) for u in range(units)]
        design = np.stack([column.numpy().ravel() for column in columns], axis=1)
        target = y.numpy().ravel() - design.sum(1)
        damped = np.vstack([design, 1.5 * np.eye(units)])
        expected, *_ = np.linalg.lstsq(damped, np.concatenate([target, np.zeros(units)]), rcond=None)
        np.testing.assert_allclose(found.numpy(), 1 + expected, rtol=1e-8)

    def test_gradients_are_means_over_mini_batches(self) -> None:
        model = build_model().double()
        parts = parts_of(layer_views(model))
        generator = torch.Generator().manual_seed(4)
        found = mask_gradients(
            model,
            parts,
            BATCHES,
            lambda output, index: log_likelihood(output, BATCHES[index], generator, objective_of(model)),
        )
        each = torch.cat([torch.cat(batch.masks, 1) for batch in found])
        learnt = learn_kwon(model, BATCHES, seed=4)
        expected = torch.stack([each[:32].mean(0), each[32:].mean(0)])
        torch.testing.assert_close(torch.cat(list(learnt.gradients), 1), expected)

    def test_scalars_are_in_the_weights(self) -> None:
        """Each kept column of a consumer is the dense one, times one number for its unit."""
        model = build_model(initializer_range=0.3)
        pruned = prune_model(model, BATCHES, mu=0.5, method="kwon")
        scaled = 0
        for dense, part, layer in zip(
            parts_of(layer_views(model))[1::2],
            parts_of(layer_views(pruned.model))[1::2],
            pruned.plan.layers,
            strict=True,
        ):
            ratio = part.consumer.weight / dense.consumer.weight[:, list(layer.neurons)]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-4)
            scaled += int((ratio[0] - 1).abs().max() > 1e-3)
        assert scaled

    def test_tuning_stops_when_scales_explode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build_model()
        monkeypatch.setattr("shrinkformer.prune.kwon._LARGEST_SCALE", 0.0)
        pruned = prune_model(model, BATCHES, mu=0.5, method="kwon")
        for dense, view, layer in zip(layer_views(model), layer_views(pruned.model), pruned.plan.layers, strict=True):
            kept = list(layer.neurons)
            assert torch.equal(view.feed_forward_output.weight, dense.feed_forward_output.weight[:, kept])


class TestKnowledge:
    @pytest.mark.parametrize("family", ["bert", "llama"])
    def test_representational_by_hand(self, family: str) -> None:
        for part in parts_of(layer_views(build_model(family)))[:2]:
            rows, weight = normal(20, part.consumer.in_features).float(), part.consumer.weight.detach()
            found = contributions(part, rows)
            for unit in range(part.units):
                columns = slice(unit * part.width, (unit + 1) * part.width)
                by_hand = float((rows[:, columns] @ weight[:, columns].T).square().sum())
                assert float(found[unit]) == pytest.approx(by_hand, rel=1e-4)

    def test_predictive_by_hand(self) -> None:
        model, other = build_model().double(), build_model(seed=1).double()
        parts = parts_of(layer_views(model))

        def loss(output: Any, index: int) -> torch.Tensor:
            mask = BATCHES[index]["attention_mask"].bool()
            with torch.no_grad():
                wanted = softened(objective_of(other).predictions(other(**BATCHES[index]), mask))
            return Target(wanted).divergence(softened(objective_of(model).predictions(output, mask)))

        found = measure(model, parts, BATCHES, loss, ALONE)
        expected = np.zeros(64)
        for index in range(len(BATCHES)):
            (batch,) = mask_gradients(model, parts, [BATCHES[index]], lambda output, _, at=index: loss(output, at))
            expected += batch.masks[3].square().sum(0).numpy()
        np.testing.assert_allclose(found.predictive[3], expected, rtol=1e-9)

    def test_a_temperature_softens(self) -> None:
        logits = normal(5, 3)
        given = Predictions((torch.log_softmax(logits, -1),), distribution=True)
        torch.testing.assert_close(softened(given, 2.0).parts[0], torch.log_softmax(logits / 2, -1))
        assert softened(Predictions((logits,), distribution=False)).parts[0] is logits

    def test_scales_do_not_matter(self) -> None:
        views = layer_views(build_model())
        parts, costs = parts_of(views), CostModel.of(views, Budget(0.5, 16.0))
        rng = np.random.default_rng(0)
        some, others = ([rng.random(part.units) for part in parts] for _ in range(2))
        found = Knowledge(some, others).importance(parts, costs)
        again = Knowledge([1e-9 * part for part in some], [1e3 * part for part in others]).importance(parts, costs)
        for ours, theirs in zip(found, again, strict=True):
            np.testing.assert_allclose(ours, theirs)


def second_feed_forward(model: Any) -> tuple[torch.Tensor, ...]:
    """Of the second block: what the layer that ends it sees and makes, and what that is added to; tokens only."""
    view = layer_views(model)[1]
    first = view.linear(view.architecture.feed_forward.inputs[0]).module
    modules = {"last": view.feed_forward_output.module, "first": first, "block": view.block}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("x", "made", "between", "end")}
    with torch.no_grad():
        for batch in BATCHES:
            mask = batch["attention_mask"].bool()
            with watched(modules) as seen:
                model(**batch)
            end = seen.outputs["block"]
            found = (seen.inputs["last"], seen.outputs["last"], seen.inputs["first"])
            for name, tensor in zip(rows, (*found, end[0] if isinstance(end, tuple) else end), strict=True):
                rows[name].append(tensor.reshape(*mask.shape, -1)[mask])
    x, made, between, end = (torch.cat(rows[name]) for name in rows)
    return x, made, end - made if view.pre_norm else between


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_a_consumer_is_fitted_to_what_the_dense_model_has_behind_it(family: str) -> None:
    """Against passes of two whole models and numpy's least squares, for the neurons of the second block."""
    dense = build_model(family).double()
    small = copy.deepcopy(dense)
    for part in parts_of(layer_views(small))[:4]:
        part.remove_all_but(torch.arange(0, part.units, 2))
    for parts, passes_dense, passes in paired_blocks(dense, layer_views(small), BATCHES, iter):
        sums = wanted_outputs(parts[1], passes, passes_dense, ALONE)
        if parts[0].view.index == 1:
            break
    (_, dense_output, dense_residual), (x, _, residual) = (second_feed_forward(model) for model in (dense, small))
    bias = layer_views(dense)[1].feed_forward_output.bias
    assert bias is not None
    target = dense_output + dense_residual - residual - bias.detach()
    expected, *_ = np.linalg.lstsq(x.numpy(), target.numpy(), rcond=None)
    found = sums.centred(intercept=False).solve(torch.zeros(x.shape[1], 32), 1e-12)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


@each_family
@pytest.mark.parametrize("method", ["kwon", "kprune"])
def test_every_family_is_pruned_saved_and_loaded(method: str, family: str, tmp_path: Any) -> None:
    model = build_model(family, num_hidden_layers=2)
    pruned = prune_model(model, BATCHES[:2], mu=0.5, method=method, sequence_length=16)
    assert 0.48 < pruned.plan.ratio <= 0.5
    batch = make_batches([16], batch_size=1)[0]
    assert count_matmul_macs(pruned.model, batch) == pytest.approx(pruned.plan.macs)
    save(pruned.model, tmp_path / "small", plan=pruned.plan)
    assert torch.equal(outputs(load(tmp_path / "small").eval(), BATCHES[0]), outputs(pruned.model, BATCHES[0]))


@pytest.mark.parametrize("method", ["obs", "flap", "wanda", "wanda-refit"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_ranking_baselines_are_saved_and_loaded(method: str, family: str, tmp_path: Any) -> None:
    pruned = prune_model(build_model(family), BATCHES[:2], mu=0.4, method=method, sequence_length=16)
    save(pruned.model, tmp_path / "small", plan=pruned.plan)
    assert torch.equal(outputs(load(tmp_path / "small").eval(), BATCHES[0]), outputs(pruned.model, BATCHES[0]))


@pytest.mark.parametrize("method", ["obs", "flap", "wanda", "wanda-refit", "kwon", "kprune"])
def test_all_of_the_budget_changes_nothing(method: str) -> None:
    model = build_model()
    pruned = prune_model(model, BATCHES[:1], mu=1.0, method=method)
    assert torch.equal(outputs(pruned.model, BATCHES[0]), outputs(model, BATCHES[0]))


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "Model"])
@pytest.mark.parametrize("method", ["kwon", "kprune"])
def test_other_heads_of_encoders(method: str, head: str) -> None:
    pruned = prune_model(build_model("bert", head), BATCHES[:1], mu=0.5, method=method, sequence_length=16)
    assert pruned.plan.ratio <= 0.5


@pytest.mark.parametrize("method", ["kwon", "kprune"])
def test_floors_rounding_and_small_budgets(method: str) -> None:
    learner = learn_kwon if method == "kwon" else learn_kprune
    learnt: Kwon | KPrune = learner(build_model(), BATCHES)
    plan = learnt.prune(Budget(0.4, 16.0, round_to=8, min_heads=2, min_neurons=10)).plan
    assert plan.ratio <= 0.4
    assert all(heads >= 2 for heads in plan.heads)
    assert all(neurons >= 16 and neurons % 8 == 0 for neurons in plan.neurons)


@pytest.mark.parametrize("method", ["kwon", "kprune"])
def test_they_are_nearer_than_slices_of_equal_size(method: str) -> None:
    model, many = (
        build_model(initializer_range=0.3),
        make_batches([3 + index % 18 for index in range(256)], batch_size=64),
    )

    def left(name: str) -> float:
        objective = objective_of(model)
        other = prune_model(model, many, mu=0.5, method=name, sequence_length=16).model
        with torch.no_grad():
            pairs = [
                (
                    objective.predictions(model(**batch), batch["attention_mask"].bool()),
                    objective.predictions(other(**batch), batch["attention_mask"].bool()),
                )
                for batch in BATCHES
            ]
        return sum(float(Target(dense).divergence(found)) for dense, found in pairs)

    assert left(method) < left("magnitude")


def test_broken_weights_are_noticed() -> None:
    model = build_model()
    layer_views(model)[1].feed_forward_output.weight.data[0, 0] = float("nan")
    for learner in (learn_kwon, learn_kprune):
        with pytest.raises(NumericalError, match="NaN or infinity"):
            learner(model, BATCHES[:1])
