"""What errors of a layer's outputs do to predictions."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from shrinkformer.architectures import layer_views
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.fisher import output_metrics
from shrinkformer.prune.objective import objective_of
from shrinkformer.prune.surgery import Weights, rebuild
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.grid import fit_grid
from shrinkformer.quantize.layer import quantize_weight
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.quantize.recipe import RECIPES
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.quantize.solver import Hessian
from tests.conftest import FAMILIES, build_model, make_batches, task_heads

BATCHES = make_batches([3 + index % 18 for index in range(64)], batch_size=8)


def layers_of(model: Any) -> dict[str, nn.Module]:
    (view, *_) = layer_views(model)
    architecture = view.architecture
    paths = (architecture.attention.value, architecture.feed_forward.inputs[0], architecture.feed_forward.output)
    return {path: view.linear(path).module for path in paths}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_head(family: str) -> None:
    for head in task_heads(family):
        model = build_model(family, head)
        before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
        found = output_metrics(model, layers_of(model), BATCHES, objective=objective_of(model), tokens=100)
        again = output_metrics(model, layers_of(model), BATCHES, objective=objective_of(model), tokens=100)
        for path, metric in found.items():
            assert torch.equal(metric, again[path])
            assert torch.allclose(metric, metric.T)
            assert float(torch.linalg.eigvalsh(metric.double()).min()) > -1e-4 * float(metric.diagonal().max())
            assert float(metric.diagonal().max()) > 0
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(module._backward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_heads_that_were_narrowed(family: str) -> None:
    model = build_model(family)
    for view in layer_views(model):
        dense = replace(layer_sizes([view])[0], query_width=3, value_width=5)
        rows = dict.fromkeys(view.architecture.attention.producers[:2], 4 * dense.query_width)
        rows[view.architecture.attention.value] = 4 * dense.value_width
        filling = {
            path: Weights(view.linear(path).weight[:count].clone(), view.linear(path).bias[:count].clone())
            for path, count in rows.items()
        }
        output = view.linear(view.architecture.attention.output)
        filling[view.architecture.attention.output] = Weights(output.weight[:, :20].clone(), output.bias.clone())
        rebuild(view, dense, filling)
    found = output_metrics(model, layers_of(model), BATCHES, objective=objective_of(model), tokens=100)
    (view, *_) = layer_views(model)
    assert {path: len(metric) for path, metric in found.items()} == {
        path: view.linear(path).out_features for path in layers_of(model)
    }
    quantized = quantize_(model, BATCHES, QuantizeConfig(bits=4, group_size=-1))
    assert len(quantized.layers) == 6 * len(layer_views(model))


def test_it_predicts_the_divergence_of_a_small_error() -> None:
    """KL of the predictions is e'Ge / 2, summed over tokens, for one error e added to the output of a layer."""
    model = build_model("bert", hidden_size=16, intermediate_size=32)
    batches = make_batches([8] * 4096, batch_size=4096)
    layer = layer_views(model)[-1].linear("output.dense").module
    metric = output_metrics(model, {"it": layer}, batches, objective=objective_of(model), tokens=10**9)["it"].double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        before = torch.log_softmax(model(**batches[0]).logits.double(), -1)
        measured, predicted = [], []
        for _ in range(4):
            # errors of tokens are independent, and only the first token is read by the classifier
            error = 0.02 * torch.randn(16, generator=generator)
            signs = torch.randn(4096, 8, 1, generator=generator)
            handle = layer.register_forward_hook(lambda _m, _i, out, e=error, s=signs: out + s * e)
            after = torch.log_softmax(model(**batches[0]).logits.double(), -1)
            handle.remove()
            measured.append(float((before.exp() * (before - after)).sum()))
            predicted.append(float(error.double() @ metric @ error.double()) / 2)
    assert sum(measured) == pytest.approx(sum(predicted), rel=0.2)


def test_directions_that_do_not_matter_take_the_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    rows = torch.randn(500, 64, generator=generator).double()
    hessian, scheme = Hessian.of(rows.T @ rows), Scheme(3, 32)
    half = torch.randn(8, 32, generator=generator)
    metric = half.T @ half  # of rank 8: most errors are free
    costs = []
    for given in (None, metric):
        found = quantize_weight(weight, hessian, scheme, RECIPES["shrink"], dtype=torch.float16, metric=given)
        difference = weight - found.weight.decode()
        costs.append(float((metric @ difference @ hessian.damped * difference).sum()))
    assert costs[1] < 0.8 * costs[0]
    grid = fit_grid(weight, scheme, dtype=torch.float16)
    rounded = weight - grid.decode(grid.encode(weight))
    assert costs[1] <= float((metric @ rounded @ hessian.damped * rounded).sum())
