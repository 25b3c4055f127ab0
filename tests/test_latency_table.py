"""Budgets of time: what a table says between its points, and plans that keep to it."""

import numpy as np
import pytest

from shrinkformer.architectures import layer_views
from shrinkformer.commands.prune_bert import main
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import BudgetError, InputError
from shrinkformer.prune.budget import Budget, CostModel, layer_sizes
from shrinkformer.prune.latency_table import LatencyCosts, LatencyTable
from shrinkformer.prune.shrink import learn
from shrinkformer.prune.shrink_config import ShrinkConfig
from tests.conftest import build_model, make_batches

TABLE = LatencyTable(
    heads=(1, 2, 4),
    query_widths=(4, 8),
    value_widths=(8,),
    attention=np.array([[[1.0], [2.0]], [[2.0], [3.0]], [[4.0], [5.0]]]),
    neurons=(2, 64),
    feed_forward=np.array([0.0, 6.2]),
)


def test_times_are_exact_where_measured_and_linear_in_between() -> None:
    size = LayerSize(heads=2, head_size=8, neurons=33, query_width=4)
    assert TABLE.of_attention(size) == 2
    assert TABLE.of_attention(LayerSize(heads=3, head_size=8, neurons=1, query_width=6)) == pytest.approx(3.5)
    assert TABLE.of_attention(LayerSize(heads=4, head_size=8, neurons=1)) == 5
    assert TABLE.of_neurons(33) == pytest.approx(3.1)
    assert TABLE.of_neurons(1) == 0


@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_more_never_takes_less(family: str) -> None:
    model = build_model(family)
    narrow = ("query_width", "value_width") if family == "bert" else ()
    table = LatencyTable.measure(model, (2, 16), narrow=narrow, repeats=2)
    full = layer_sizes(layer_views(model))[0]
    assert table.of_attention(full) + table.of_neurons(full.neurons) > 0  # each alone may drown in noise
    assert all((np.diff(table.attention, axis=axis) >= 0).all() for axis in range(3))
    assert (np.diff(table.feed_forward) >= 0).all()
    assert table.neurons[-1] == full.neurons
    assert len(table.query_widths) == (3 if narrow else 1)


def test_plans_keep_to_a_budget_of_time() -> None:
    """With a table where neurons cost nothing, heads have to go and neurons stay."""
    learnt = learn(build_model("bert"), make_batches([9] * 40, batch_size=8), ShrinkConfig(search_seconds=0))
    sizes = layer_sizes(layer_views(learnt.model))
    free = LatencyTable((1, sizes[0].heads), (8,), (8,), np.array([[[1.0]], [[4.0]]]), (1, 64), np.zeros(2))
    timed = type(learnt)(**{**vars(learnt), "latency": free})
    pruned = timed.prune(Budget(0.5, 9.0))
    assert pruned.plan.budget == "latency"
    assert set(pruned.plan.divergences) == {"shrink"}
    kept = layer_sizes(layer_views(pruned.model))
    costs = LatencyCosts(tuple(kept), 32, Budget(0.5, 9.0), table=free)
    assert costs.dense <= 0.5 * LatencyCosts(sizes, 32, Budget(0.5, 9.0), table=free).dense
    assert [layer.neurons for layer in kept] == [layer.neurons for layer in sizes]
    assert pruned.plan.ratio == pytest.approx(CostModel(tuple(kept), 32, Budget(1, 9.0)).dense / pruned.plan.dense_macs)


def test_what_cannot_be_met_is_said() -> None:
    sizes = layer_sizes(layer_views(build_model("bert")))
    slow = LatencyTable((1, 4), (8,), (8,), np.array([[[3.0]], [[4.0]]]), (1, 64), np.zeros(2))
    with pytest.raises(BudgetError, match=r"take 0\.75 of the time on this machine; raise --mu or use --budget macs"):
        LatencyCosts(sizes, 32, Budget(0.5, 9.0), table=slow).require_feasible()
    with pytest.raises(InputError, match="--latency_shape 0 16"):
        LatencyTable.measure(build_model("bert"), (0, 16))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--budget", "flops"], "--budget 'flops': choose one of macs, latency"),
        (["--budget", "latency", "--method", "stat"], "--budget latency: --method stat counts MACs only"),
        (["--budget", "latency", "--method", "shrink", "--latency_shape", "0", "8"], "--latency_shape 0 8"),
    ],
)
def test_flags_are_checked_first(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model_name", "all-MiniLM-L6-v2", "--task_name", "similarity", "--bundled_data", *flags]) == 2
    assert expected in capsys.readouterr().err
