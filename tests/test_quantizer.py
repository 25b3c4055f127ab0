"""Quantizing whole models: every family, both sides of a correction, order of examples, processes."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from shrinkformer.architectures import layer_views
from shrinkformer.errors import InputError
from shrinkformer.prune.passes import BlockPasses, DensePass
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.sites import block_sites
from shrinkformer.prune.stream import BlockStream
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from tests.conftest import FAMILIES, build_model, make_batches

BATCHES = make_batches([3 + index % 18 for index in range(48)], batch_size=8)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "opt-350m": ("opt", {"do_layer_norm_before": False}),  # norms behind the sublayers, none behind the blocks
    "opt without final norm": ("opt", {"_remove_final_layer_norm": True}),
    "opt with plain norms": ("opt", {"layer_norm_elementwise_affine": False}),
    "opt without biases": ("opt", {"enable_bias": False}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}
"""Families, and configurations of them in which something that the others have stands elsewhere, or nowhere."""


@torch.no_grad()
def divergence(model: Any, dense: Any) -> float:
    """Sum of squares of what the outputs differ by, tokens only."""
    total = 0.0
    for batch in BATCHES:
        mask = batch["attention_mask"].bool()
        ours, theirs = (some.base_model(**batch).last_hidden_state[mask] for some in (model, dense))
        total += float((ours - theirs).double().square().sum())
    return total


@pytest.mark.parametrize("variant", VARIANTS)
class TestPasses:
    def test_attention_from_memory_is_attention(self, variant: str) -> None:
        family, sizes = VARIANTS[variant]
        model = build_model(family, **sizes)
        view = layer_views(model)[0]
        stream, again = BlockStream(model, BATCHES), BlockStream(model, BATCHES)
        passes = BlockPasses(stream, view)
        for index in range(len(BATCHES)):
            passes.inputs(view.architecture.attention.output, index)
        with torch.no_grad():
            view.attention_output.weight.mul_(0.5)  # quantized in between
        passes.advance()
        again.run(view.block)
        for index in range(len(BATCHES)):
            torch.testing.assert_close(stream.hidden(index), again.hidden(index), rtol=1e-5, atol=1e-6)
        assert "forward" not in vars(view.block.get_submodule(view.architecture.attention.module))

    def test_both_sides_see_the_same_before_anything_is_quantized(self, variant: str) -> None:
        family, sizes = VARIANTS[variant]
        model = build_model(family, **sizes)
        view = layer_views(model)[0]
        aim = replace(view, block=copy.deepcopy(view.block))
        sites = block_sites(view.architecture)
        dense = DensePass(BlockStream(model, BATCHES), aim, sites)
        passes = BlockPasses(BlockStream(model, BATCHES), view)
        with torch.no_grad():
            for site in sites:
                for index in range(len(BATCHES)):
                    if not site.residual:
                        torch.testing.assert_close(passes.inputs(site.paths[0], index), dense.inputs(site, index))
                        continue
                    rows, residual = passes.ending(site, index)
                    wanted, before = dense.wanted(site, index)
                    made = torch.nn.functional.linear(rows, view.linear(site.paths[0]).weight)
                    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(residual, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_bits_change_little_and_three_bits_less_than_rounding(variant: str) -> None:
    family, sizes = VARIANTS[variant]
    dense = build_model(family, **sizes)
    errors = {}
    for bits, quantizer in ((8, "shrink"), (3, "shrink"), (3, "gptq"), (3, "rtn")):
        model = copy.deepcopy(dense)
        found = quantize_(model, BATCHES, QuantizeConfig(bits, 16, quantizer=quantizer))
        errors[bits, quantizer] = divergence(model, dense)
        for name, weight in found.weights.items():
            stored: Any = model.get_submodule(name)
            shaped = stored.weight.T if type(stored).__name__ == "Conv1D" else stored.weight
            torch.testing.assert_close(weight.decode(), shaped, rtol=0, atol=0)
            assert int(weight.codes.max()) < 2**bits
    assert errors[8, "shrink"] < 3e-3 * errors[3, "shrink"]
    assert errors[3, "shrink"] < 0.8 * errors[3, "rtn"]
    assert errors[3, "shrink"] < errors[3, "gptq"]


def test_only_the_layers_that_were_asked_for() -> None:
    for scope, expected in (("attention", 4), ("ffn", 2), ("all", 6)):
        model, dense = build_model("opt"), build_model("opt")
        found = quantize_(model, BATCHES, QuantizeConfig(2, 16, layers=scope))
        assert len(found.weights) == 3 * expected
        changed = {
            name.rpartition(".")[0]
            for (name, new), old in zip(model.named_parameters(), dense.parameters(), strict=True)
            if name.endswith("weight") and not torch.equal(new, old) and "norm" not in name
        }
        assert changed == set(found.weights)


def test_the_dense_model_is_aimed_at_after_pruning() -> None:
    dense = build_model("opt")
    pruned = prune_model(dense, BATCHES, mu=0.7, method="stat-bias").model
    alone, aimed = copy.deepcopy(pruned), copy.deepcopy(pruned)
    quantize_(alone, BATCHES, QuantizeConfig(4, 16))
    quantize_(aimed, BATCHES, QuantizeConfig(4, 16), dense=dense)
    assert divergence(aimed, dense) < divergence(alone, dense)


def test_the_same_seed_gives_the_same_and_the_generator_stays() -> None:
    state = torch.random.get_rng_state()
    models = [build_model("llama") for _ in range(2)]
    for model in models:
        quantize_(model, BATCHES, QuantizeConfig(3, 16))
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_padding_and_batch_size_change_nothing() -> None:
    lengths = [3 + index % 18 for index in range(48)]
    models = [build_model("opt").double() for _ in range(2)]
    for model, size in zip(models, (48, 1), strict=True):
        recipe = QuantizeConfig(3, 16, quantizer="gptq")
        quantize_(model, make_batches(lengths, batch_size=size), recipe)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "--bits 5"),
        ({"group_size": 0}, "--group_size 0"),
        ({"quantizer": "best"}, "--quantizer 'best'"),
        ({"layers": "norms"}, "--layers 'norms'"),
        ({"bits": 1, "symmetric": False}, "--bits 1"),
    ],
)
def test_bad_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizeConfig(**arguments)
