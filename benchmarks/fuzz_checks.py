"""What holds for every model, plan, budget and calibration sample; drawn by hypothesis, see ``benchmarks.fuzz``."""

import json
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.fuzz_models import Batch, apply_cut, draw_batches, draw_cuts, draw_model, masked
from shrinkformer.architectures import layer_views
from shrinkformer.efficiency.macs import LayerSize, count_matmul_macs, model_macs
from shrinkformer.efficiency.size import count_parameters
from shrinkformer.errors import BudgetError, InputError, ShrinkformerError
from shrinkformer.prune.budget import Budget, CostModel, layer_sizes
from shrinkformer.prune.checkpoint import describe_sizes, load, save
from shrinkformer.prune.names import KPRUNE, METHOD_NAMES, SHRINK
from shrinkformer.prune.plan import LayerPlan, Plan
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.stream import count_tokens

SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where checkpoints go for a moment; in memory where there is such a place."""

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
"""Of results that are computed in another order, relative to the largest of them; half precision is not compared."""


def check_plan(data: st.DataObject, family: str) -> str:
    """Any plan: surgery, save and load keep the logits, and formulas count what is really there.

    Args:
        data: What is drawn from.
        family: Name of the family.

    Returns:
        What happened, for the counts.
    """
    model = draw_model(data, family, [torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16])
    (batch,) = draw_batches(data, most=1, left=False)
    cuts = draw_cuts(data, layer_views(model))
    how_often = data.draw(st.integers(0, 3), "what else is compared")
    dense = layer_sizes(layer_views(model))
    before = count_parameters(model)
    expected = outputs(masked(model, cuts), batch)
    sizes = [apply_cut(view, cut) for view, cut in zip(layer_views(model), cuts, strict=True)]
    found = outputs(model, batch)
    assert layer_sizes(layer_views(model)) == tuple(sizes)
    assert count_parameters(model) == before - sum(map(_removed, layer_views(model), dense, sizes))
    length, hidden = batch["input_ids"].shape[1], layer_views(model)[0].hidden_size
    layers = [
        LayerPlan(tuple(cut.heads), tuple(cut.neurons), 0.0, 0.0, size.query_width, size.value_width)
        for cut, size in zip(cuts, sizes, strict=True)
    ]
    costs = [model_macs(of, hidden, length) for of in (dense, sizes)]
    plan = Plan("any", 1.0, 0, length, costs[0], costs[1], tuple(layers))
    _same(expected, found, _tokens(batch, found))
    _saved_and_loaded(model, plan, batch, again=how_often == 0)
    if how_often == 1:
        assert count_matmul_macs(model, batch) == costs[1] * len(batch["input_ids"])
    if how_often == 2:
        row = {name: tensor[-1:, : int(batch["attention_mask"][-1].sum())] for name, tensor in batch.items()}
        alone, beside = outputs(model, row), found[-1:]
        _same(beside[:, : alone.shape[1]] if alone.shape[1:2] == row["input_ids"].shape[1:] else beside, alone)
    return "stock shape" if not getattr(model.config, "shrinkformer", None) else "own shape"


def check_budget(data: st.DataObject, family: str) -> str:
    """Any budget: a model within it that loads as it is, or the right refusal; and nothing else is changed."""
    model = draw_model(data, family, [torch.float32] * 3 + [torch.float64])
    if data.draw(st.integers(0, 3), "was pruned before") == 0:
        for view, cut in zip(layer_views(model), draw_cuts(data, layer_views(model)), strict=True):
            apply_cut(view, cut)
        describe_sizes(model)
    batches = draw_batches(data)
    method = data.draw(st.sampled_from(METHOD_NAMES), "method")
    ask = _Asked(model, batches, method, _draw_budget(data, model, batches), _draw_config(data))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with global_generators_kept():
        try:
            pruned = ask.prune()
        except (BudgetError, InputError) as error:
            _check_refusal(ask, error)
            return f"{method}: refused"
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items()), "changed the model"
    _check_sizes(ask, pruned)
    found = outputs(pruned.model, batches[0])
    assert torch.isfinite(found).all()
    if ask.budget.mu == 1 and method == "stat" and ask.budget.round_to == 1 and not ask.budget.uniform:
        assert torch.equal(found, outputs(model, batches[0]))
    _saved_and_loaded(pruned.model, pruned.plan, batches[0])
    if data.draw(st.integers(0, 2), "twice") == 0:
        again = ask.prune()
        assert again.plan == pruned.plan
        assert torch.equal(outputs(again.model, batches[0]), found)
    return f"{method}: pruned"


@dataclass(frozen=True)
class _Asked:
    """What a model is asked to become."""

    model: PreTrainedModel
    batches: Sequence[Batch]
    method: str
    budget: Budget
    config: ShrinkConfig

    def prune(self) -> Pruned:
        return calibrate(self.model, self.batches, method=self.method, seed=3, config=self.config).prune(self.budget)


def _draw_config(data: st.DataObject) -> ShrinkConfig:
    seconds = data.draw(st.sampled_from([0.0, 0.0, 0.0, 600.0]), "seconds of search")
    return ShrinkConfig(whole_heads=data.draw(st.booleans(), "whole heads"), search_seconds=seconds)


def _draw_budget(data: st.DataObject, model: PreTrainedModel, batches: Sequence[Batch]) -> Budget:
    """Any budget; often one near the least that is possible."""
    mean = count_tokens(batches) / sum(len(batch["input_ids"]) for batch in batches)
    budget = Budget(
        mu=data.draw(st.floats(0.01, 1.0) | st.just(1.0), "mu"),
        sequence_length=data.draw(st.just(mean) | st.floats(0.5, 600.0), "sequence length"),
        round_to=data.draw(st.sampled_from([1, 1, 1, 2, 3, 8]), "round_to"),
        min_heads=data.draw(st.sampled_from([1, 1, 1, 1, 2, 5]), "min_heads"),
        min_neurons=data.draw(st.sampled_from([1, 1, 1, 1, 4, 30]), "min_neurons"),
        uniform=data.draw(st.sampled_from([False, False, False, True]), "uniform"),
    )
    share = data.draw(st.sampled_from([None, None, None, None, None, 0.999, 1.0, 1.001, 1.05]), "of the least")
    least = _least(model, budget)
    return budget if share is None or least is None else replace(budget, mu=min(1.0, share * least))


def _least(model: PreTrainedModel, budget: Budget) -> float | None:
    """The share of the MACs that the smallest model with whole heads takes, by trying; None where there is none."""
    views = layer_views(model)
    try:
        costs = CostModel.of(views, budget)
    except InputError:
        return None
    step, sizes = budget.round_to, layer_sizes(views)
    least: list[list[LayerSize]] = []
    for size in sizes:
        neurons = [count for count in range(step, size.neurons + 1, step) if count >= budget.min_neurons]
        neurons = neurons or [size.neurons // step * step]
        heads = [heads for heads in range(1, size.heads + 1) if heads >= budget.min_heads] or [size.heads]
        least.append([replace(size, heads=count, neurons=min(neurons)) for count in heads])
    if min(size.neurons for size in sizes) < step:
        return None
    if not budget.uniform:
        return _macs([options[0] for options in least], costs) / costs.dense
    fewest = min(size.neurons for size in sizes) // step * step
    alike = min(max(-(-budget.min_neurons // step) * step, step), fewest)
    counts = [heads for heads in costs.head_counts if heads >= budget.min_heads] or [costs.head_counts[-1]]
    return min(_macs([replace(size, heads=heads, neurons=alike) for size in sizes], costs) for heads in counts) / (
        costs.dense
    )


def _macs(sizes: Sequence[LayerSize], costs: CostModel) -> float:
    return model_macs(sizes, costs.hidden_size, costs.budget.sequence_length)


def _check_refusal(ask: _Asked, error: ShrinkformerError) -> None:
    """The smallest possible model is really too large, and the message names its share."""
    if ask.budget.uniform and ask.method == KPRUNE:
        return
    least = _least(ask.model, ask.budget)
    if least is None:
        assert "round_to" in str(error) or "--uniform" in str(error), error
        return
    assert least > ask.budget.mu * (1 - 1e-9), f"possible with {least}: {error}"
    stated = re.search(r"(?:takes mu|can is) ([0-9.]+[0-9])", str(error))
    assert stated, error
    assert abs(float(stated[1]) - least) <= 1.01e-4, f"the least is {least}: {error}"


def _check_sizes(ask: _Asked, pruned: Pruned) -> None:
    """Budget and floors hold, and the plan says what the model is."""
    plan, budget, full = pruned.plan, ask.budget, layer_sizes(layer_views(ask.model))
    sizes = layer_sizes(layer_views(pruned.model))
    assert plan.macs <= budget.mu * plan.dense_macs
    assert plan.macs == _macs(sizes, CostModel.of(layer_views(ask.model), replace(budget, uniform=False)))
    assert plan.heads == [size.heads for size in sizes]
    assert plan.neurons == [size.neurons for size in sizes]
    for size, dense in zip(sizes, full, strict=True):
        assert size.heads >= min(budget.min_heads, dense.heads)
        if size.neurons < dense.neurons:
            assert size.neurons % budget.round_to == 0
            assert size.neurons >= min(budget.min_neurons, dense.neurons // budget.round_to * budget.round_to)
        assert ask.method == SHRINK or size.head_size == dense.head_size
    if budget.uniform and budget.mu < 1:
        assert len(set(sizes)) == 1
        assert not getattr(pruned.model.config, "shrinkformer", None)
    assert Plan.from_json(plan.to_json()) == plan


def _removed(view: Any, dense: LayerSize, small: LayerSize) -> int:
    """Parameters that a block lost."""
    return _parameters(view, dense) - _parameters(view, small)


def _parameters(view: Any, size: LayerSize) -> int:
    """Parameters of a block that depend on its size; the view tells which layers have a bias."""
    attention, feed_forward = view.architecture.attention, view.architecture.feed_forward
    queries, keys = size.heads * size.queries * size.query_width, size.heads * size.query_width
    values = size.heads * size.value_width
    rows = {attention.query: queries, attention.key: keys, attention.value: values}
    if attention.fused:
        rows = {attention.query: 3 * size.heads * size.head_size}
    rows |= dict.fromkeys(feed_forward.inputs, size.neurons)
    biases = sum(count for path, count in rows.items() if view.linear(path).bias is not None)
    columns = size.heads * size.queries * size.value_width + size.neurons
    return (sum(rows.values()) + columns) * int(view.hidden_size) + biases


def _saved_and_loaded(model: PreTrainedModel, plan: Plan, batch: Batch, *, again: bool = False) -> None:
    """A folder gives back the same model, to the last bit; and so does the folder that is made from that."""
    expected = outputs(model, batch)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        folder = save(model, Path(scratch) / "small", plan=plan)
        loaded = load(folder, attn_implementation=model.config._attn_implementation).eval()
        held = model.state_dict()
        assert all(torch.equal(tensor, held[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(outputs(loaded, batch), expected)
        assert layer_sizes(layer_views(loaded)) == layer_sizes(layer_views(model))
        assert count_parameters(loaded) == count_parameters(model)
        assert loaded.dtype == model.dtype
        assert Plan.from_json((folder / "shrinkformer_plan.json").read_text()) == plan
        if again:
            second = save(loaded, Path(scratch) / "second", plan=plan)
            assert (second / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
            assert json.loads((second / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@torch.no_grad()
def outputs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits, hidden states, or the start and end of answers."""
    found = model(**batch)
    first: Tensor = torch.stack([found[0], found[1]], -1) if "end_logits" in found else found[0]
    return first


def _tokens(batch: Batch, found: Tensor) -> Tensor | None:
    """Where outputs stand for a token; None where they are of whole examples."""
    mask = batch["attention_mask"].bool()
    return mask if found.ndim == 3 and found.shape[:2] == mask.shape else None


def _same(one: Tensor, other: Tensor, where: Tensor | None = None) -> None:
    """Compare numbers that were summed in another order."""
    if one.dtype not in TOLERANCE:
        return
    one, other = (one, other) if where is None else (one[where], other[where])
    scale = max(1.0, float(one.abs().max()))
    torch.testing.assert_close(other, one, rtol=0, atol=TOLERANCE[one.dtype] * scale)


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Assert that nobody drew from a global generator."""
    before = _generators()
    yield
    for (name, old), (_, new) in zip(before, _generators(), strict=True):
        assert old == new, f"global generator of {name} was used"


def _generators() -> list[tuple[str, Any]]:
    numbers: Any = np.random.get_state()
    return [
        ("torch", torch.get_rng_state().numpy().tobytes()),
        ("numpy", (numbers[1].tobytes(), *numbers[2:])),
        ("random", random.getstate()),
    ]
