"""Every architecture record goes through the same promises. A new record adds its name to ``conftest.FAMILIES``."""

from typing import Any

import pytest
import torch

from shrinkformer.architectures import find_architecture, layer_views, unit_columns
from shrinkformer.errors import UnsupportedModelError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.pruner import calibrate, prune_model
from shrinkformer.prune.refit import slice_consumer
from shrinkformer.prune.surgery import remove_heads, remove_neurons
from tests.conftest import FAMILIES, GROUPED, build_model, make_batches, task_heads

each_family = pytest.mark.parametrize("family", FAMILIES)


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[0]


@each_family
def test_sizes_are_read_from_the_weights(family: str) -> None:
    views = layer_views(build_model(family))
    heads, queries = (2, 2) if family in GROUPED else (4, 1)
    sizes = [(view.heads, view.queries, view.head_size, view.neurons, view.hidden_size) for view in views]
    assert sizes == [(heads, queries, 8, 64, 32)] * 3


@each_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_surgery_equals_a_masked_model(family: str, attention: str, batches: list[dict[str, Any]]) -> None:
    """Removing a unit is the same as zeroing the consumer's columns."""
    masked, cut = (build_model(family, attn_implementation=attention) for _ in range(2))
    for view, zeroed in zip(layer_views(cut), layer_views(masked), strict=True):
        heads = torch.tensor([1, 0] if family in GROUPED else [0, 2, 3])[: view.index + 1].sort().values
        neurons = torch.arange(0, 64, 2 + view.index)
        columns = unit_columns(heads, view.head_width)
        for linear, kept in ((zeroed.attention_output, columns), (zeroed.feed_forward_output, neurons)):
            keep = torch.zeros(linear.in_features)
            keep[kept] = 1
            linear.weight.data *= keep
        remove_heads(view, heads, slice_consumer(view.attention_output, columns))
        remove_neurons(view, neurons, slice_consumer(view.feed_forward_output, neurons))
        assert (view.heads, view.neurons) == (len(heads), len(neurons))
    torch.testing.assert_close(outputs(cut, batches[0]), outputs(masked, batches[0]), rtol=1e-5, atol=1e-5)


@each_family
def test_full_budget_keeps_the_logits_exactly(family: str, batches: list[dict[str, Any]]) -> None:
    model = build_model(family)
    pruned = prune_model(model, batches, mu=1.0, method="stat-bias")
    assert pruned.plan.ratio == 1
    assert torch.equal(outputs(pruned.model, batches[0]), outputs(model, batches[0]))


@pytest.mark.parametrize(("family", "head"), [(family, head) for family in FAMILIES for head in task_heads(family)])
def test_every_step_from_dense_to_reloaded(
    family: str, head: str, batches: list[dict[str, Any]], tmp_path: Any
) -> None:
    model = build_model(family, head)
    pruned = prune_model(model, batches, mu=0.5, method="stat-bias")
    assert 0.4 < pruned.plan.ratio <= 0.5
    save(pruned.model, tmp_path / "small", plan=pruned.plan)
    for attention in ("eager", "sdpa"):
        pruned.model.set_attn_implementation(attention)
        reloaded = load(tmp_path / "small", attn_implementation=attention).eval()
        assert torch.equal(outputs(reloaded, batches[0]), outputs(pruned.model, batches[0]))
    assert reloaded.config.num_labels == model.config.num_labels


@each_family
def test_a_pruned_model_is_ordinary_input(family: str, batches: list[dict[str, Any]], tmp_path: Any) -> None:
    once = prune_model(build_model(family), batches, mu=0.7, method="stat-bias")
    save(once.model, tmp_path / "once", plan=once.plan)
    again = calibrate(load(tmp_path / "once"), batches, method="stat-bias").prune(
        Budget(0.6, once.plan.sequence_length)
    )
    assert again.plan.dense_macs == pytest.approx(once.plan.macs)
    assert again.plan.ratio <= 0.6
    save(again.model, tmp_path / "twice", plan=again.plan)
    reloaded = load(tmp_path / "twice").eval()
    assert torch.equal(outputs(reloaded, batches[0]), outputs(again.model, batches[0]))
    assert [view.heads for view in layer_views(reloaded)] == again.plan.heads


@each_family
def test_padding_and_batch_size_do_not_change_the_result(family: str) -> None:
    lengths = [3 + index % 18 for index in range(40)]
    plans = [
        prune_model(
            build_model(family).double(), make_batches(lengths, batch_size=size), mu=0.5, method="stat-bias"
        ).plan
        for size in (1, 7, 40)
    ]
    for plan in plans[1:]:
        assert [(layer.heads, layer.neurons) for layer in plan.layers] == [
            (layer.heads, layer.neurons) for layer in plans[0].layers
        ]


def test_an_unknown_family_is_refused_with_the_remedy() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'t5' has no architecture record.*docs/architectures.md"):
        find_architecture("t5")
