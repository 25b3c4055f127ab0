"""What pruning promises, whatever the architecture."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from shrinkformer.architectures import layer_views
from shrinkformer.efficiency.macs import count_matmul_macs
from shrinkformer.errors import InputError, NumericalError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.cholesky import DampingWarning
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.names import METHOD_NAMES
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pruner import calibrate, prune_model
from shrinkformer.prune.refit import Correction, correct_consumer
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.statistics import stream_statistics
from shrinkformer.prune.stream import BlockStream, count_tokens
from tests.conftest import build_model, make_batches

each_method = pytest.mark.parametrize("method", METHOD_NAMES)


def kept(plan: Plan) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(layer.heads, layer.neurons) for layer in plan.layers]


def distance(model: Any, other: Any, batches: list[dict[str, Any]]) -> float:
    """Mean KL divergence between two classifiers' answers."""
    with torch.no_grad():
        pairs = [(model(**batch).logits.log_softmax(-1), other(**batch).logits.log_softmax(-1)) for batch in batches]
    return float(sum(functional.kl_div(b, a, log_target=True, reduction="sum") for a, b in pairs))


@each_method
def test_budgets_are_met_and_nothing_else_is_changed(method: str, batches: list[dict[str, Any]]) -> None:
    model = build_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    calibrated = calibrate(model, batches, method=method)
    steps = 4 if method == "shrink" else 2  # it changes the width of all heads of a block at once
    for mu in (0.3, 0.5, 0.77):
        pruned = calibrated.prune(Budget(mu, 16.0))
        assert pruned.plan.ratio <= mu
        smallest = 2 * 16 * 32 / pruned.plan.dense_macs  # one neuron
        assert pruned.plan.ratio > mu - steps * smallest
        counted = count_matmul_macs(pruned.model, make_batches([16], batch_size=1)[0])
        assert counted == pytest.approx(pruned.plan.macs)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@each_method
def test_the_same_seed_gives_the_same_plan(method: str, batches: list[dict[str, Any]]) -> None:
    plans = [
        prune_model(build_model(num_hidden_layers=2), batches[:3], mu=0.5, method=method, seed=3).plan for _ in range(2)
    ]
    assert plans[0] == plans[1]


def test_random_methods_follow_the_seed(batches: list[dict[str, Any]]) -> None:
    plans = [prune_model(build_model(), batches, mu=0.5, method="random", seed=seed).plan for seed in (0, 1)]
    assert kept(plans[0]) != kept(plans[1])


@pytest.mark.parametrize("method", ["stat", "stat-bias"])
def test_more_budget_means_less_error(method: str, batches: list[dict[str, Any]]) -> None:
    model = build_model().double()
    calibrated = calibrate(model, batches, method=method)
    results = [calibrated.prune(Budget(mu, 16.0)) for mu in (0.3, 0.5, 0.7, 0.9)]
    worst = [max(layer.ffn_error for layer in result.plan.layers) for result in results]
    assert worst == sorted(worst, reverse=True)
    errors = [distance(model, result.model, batches) for result in results]
    assert errors[0] > errors[1] > errors[3]
    assert errors[0] > 3 * errors[3]


def test_refit_beats_slicing_and_bias_helps(batches: list[dict[str, Any]]) -> None:
    model = build_model()
    error = {
        name: distance(model, prune_model(model, batches, mu=0.5, method=name).model, batches)
        for name in ("random", "random-refit", "stat", "stat-bias")
    }
    assert error["random-refit"] < error["random"]
    assert error["stat-bias"] < error["random-refit"]
    assert error["stat"] < error["random"]


def test_one_calibration_serves_every_budget(batches: list[dict[str, Any]]) -> None:
    model = build_model()
    calibrated = calibrate(model, batches, method="stat-bias")
    for mu in (0.4, 0.8):
        alone = prune_model(model, batches, mu=mu, sequence_length=16, method="stat-bias")
        together = calibrated.prune(Budget(mu, 16))
        assert together.plan == alone.plan
        assert all(
            torch.equal(a, b) for a, b in zip(together.model.parameters(), alone.model.parameters(), strict=True)
        )


def test_refit_is_least_squares_with_an_intercept() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    ) + torch.arange(12)
    linear = torch.nn.Linear(12, 5).double()
    moments = Moments.zeros(12)
    moments.update(rows)
    chosen = torch.tensor([0, 3, 4, 7, 9])
    consumer = correct_consumer(linear, moments, chosen, Correction.CENTRED)
    design = np.column_stack([rows[:, chosen].numpy(), np.ones(200)])
    target = linear(rows).detach().numpy()
    expected, *_ = np.linalg.lstsq(design, target, rcond=None)
    np.testing.assert_allclose(consumer.weight.T.numpy(), expected[:-1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(consumer.bias.numpy(), expected[-1], rtol=1e-6, atol=1e-9)
    centred = target - linear.bias.detach().numpy()
    centred -= centred.mean(0)
    residual = np.linalg.norm(target - design @ expected) / np.linalg.norm(centred)
    assert consumer.error == pytest.approx(residual, rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt", "gpt2", "qwen3"])
def test_the_stream_computes_what_the_model_computes(family: str, batches: list[dict[str, Any]]) -> None:
    """Statistics gathered block by block equal those of one ordinary forward pass with hooks."""
    model = build_model(family).double()
    for view, moments in stream_statistics(model, batches, Resources()):
        assert moments.neurons.count == count_tokens(batches)
        seen: list[torch.Tensor] = []
        consumer = view.feed_forward_output.module
        hook = consumer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        hook.remove()
        masks = [batch["attention_mask"].bool().flatten() for batch in batches]
        rows = torch.cat([x.flatten(0, -2)[mask] for x, mask in zip(seen, masks, strict=True)])
        torch.testing.assert_close(moments.neurons.second, rows.T @ rows, rtol=1e-10, atol=1e-10)


def test_the_stream_leaves_no_hook_behind_when_a_block_fails(batches: list[dict[str, Any]]) -> None:
    model = build_model()
    view = layer_views(model)[0]
    stream = BlockStream(model, batches)
    with pytest.raises(ZeroDivisionError):
        stream.run(view.block, {view.attention_output.module: lambda rows: 1 / 0})
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_plan_survives_json(batches: list[dict[str, Any]]) -> None:
    plan = prune_model(build_model(), batches, mu=0.5, method="stat-bias").plan
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["mu"] == 0.5


def test_labels_are_not_needed_and_do_not_matter(batches: list[dict[str, Any]]) -> None:
    labelled = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)} for batch in batches]
    plans = [prune_model(build_model(), some, mu=0.5, method="stat").plan for some in (batches, labelled)]
    assert plans[0] == plans[1]


def test_broken_weights_are_named(batches: list[dict[str, Any]]) -> None:
    model = build_model()
    layer_views(model)[1].feed_forward_output.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinity"):
        prune_model(model, batches, mu=0.5, method="stat-bias")


def test_unknown_method() -> None:
    with pytest.raises(InputError, match=r"--method 'best' is not known; choose one of shrink, stat"):
        prune_model(build_model(), [], mu=0.5, method="best", sequence_length=8)


@pytest.mark.gpu
def test_cuda_gives_the_same_plan(batches: list[dict[str, Any]]) -> None:
    plans = [
        prune_model(build_model().double().to(device), batches, mu=0.5, method="stat-bias").plan
        for device in ("cpu", "cuda")
    ]
    assert kept(plans[0]) == kept(plans[1])


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name != "kprune"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hardly_any_calibration_data(family: str, method: str) -> None:
    """One token, and one example again and again: second moments of rank one, rounding about the mean."""
    sizes = {"num_attention_heads": 2, "hidden_size": 4, "intermediate_size": 16, "num_hidden_layers": 2}
    once = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)}
    again = {name: tensor.expand(4, 1) for name, tensor in once.items()}
    for seed in range(3):
        for batches in ([once], [once, again]):
            model = build_model(family, seed=seed, **sizes)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DampingWarning)
                pruned = prune_model(model, batches, mu=0.7, method=method, config=ShrinkConfig(search_seconds=0))
            assert pruned.plan.ratio <= 0.7
            assert torch.isfinite(pruned.model(**once)[0]).all()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '"layers"',
        "[" * 20_000,
        json.dumps({"layers": [{"heads": 3}]}),
    ],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="this is no plan of shrinkformer") as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": "half"}, "mu is 'half'"),
        ({"macs": float("nan")}, "macs is nan"),
        ({"dense_macs": 0}, "dense_macs is 0"),
        ({"seed": True}, "seed is True"),
        ({"method": None}, "method is None"),
        ({"divergences": {"stat": "near"}}, "divergences is"),
        ({"layers": [{"heads": "01", "neurons": []}]}, "layer 0 has sizes that are no numbers"),
        ({"layers": [{"heads": [], "neurons": [], "ffn_error": "none"}]}, "layer 0 has errors that are no numbers"),
    ],
)
def test_plans_with_values_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    plan = {
        "method": "stat",
        "mu": 0.5,
        "seed": 0,
        "sequence_length": 9.0,
        "dense_macs": 2.0,
        "macs": 1.0,
        "layers": [],
    }
    assert Plan.from_json(json.dumps(plan)).ratio == 0.5
    with pytest.raises(InputError, match=message):
        Plan.from_json(json.dumps(plan | changes))
