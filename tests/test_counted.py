"""Blocks that compute more than their record counts are refused before anything is learnt."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from shrinkformer.architectures import layer_views
from shrinkformer.errors import ShrinkformerWarning, UnsupportedModelError
from shrinkformer.prune.counted import require_counted, without_weights
from shrinkformer.prune.pruner import calibrate, prune_model
from tests.conftest import FAMILIES, build_model, make_batches, task_heads


@pytest.fixture
def examples() -> list[dict[str, Any]]:
    return make_batches([9, 5, 7], batch_size=3)


@pytest.mark.filterwarnings("error::shrinkformer.errors.ShrinkformerWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_with_weights_and_without(family: str) -> None:
    for head in task_heads(family):
        model = build_model(family, head)
        require_counted(model)
        require_counted(without_weights(model))
        assert not any(tensor.is_meta for tensor in model.parameters())


@pytest.mark.filterwarnings("error::shrinkformer.errors.ShrinkformerWarning")
@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("opt", {"do_layer_norm_before": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),  # asks for a value
        ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
        ("phi", {"qk_layernorm": True}),
    ],
)
def test_configurations_that_change_what_is_around_the_products_pass(family: str, entries: dict[str, Any]) -> None:
    require_counted(build_model(family, **entries))


def test_a_pruned_model_passes(examples: list[dict[str, Any]]) -> None:
    require_counted(prune_model(build_model("llama"), examples, mu=0.5, method="stat").model)


@pytest.mark.parametrize("family", ["bert", "gpt2", "roberta"])
def test_attention_to_a_second_input_is_refused(family: str, examples: list[dict[str, Any]]) -> None:
    head = "LMHeadModel" if family != "roberta" else "ForCausalLM"
    model = build_model(family, head, is_decoder=True, add_cross_attention=True)
    with pytest.raises(UnsupportedModelError, match=r"nor counted: layer 0, crossattention\..* and \d+ others; merge"):
        calibrate(model, examples, method="stat")


def test_layers_that_somebody_added_are_refused(examples: list[dict[str, Any]]) -> None:
    model = build_model()
    layer_views(model)[1].block.output.adapter = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))
    with pytest.raises(
        UnsupportedModelError, match=r"layer 1, output\.adapter\.0\.weight and 1 others; merge adapters"
    ):
        prune_model(model, examples, mu=0.5)


def test_products_without_weights_are_counted() -> None:
    model = build_model("distilbert")
    block = layer_views(model)[2].block
    inner = block.ffn.forward
    block.ffn.forward = lambda x: inner(x @ x.transpose(1, 2) @ x)
    with pytest.raises(UnsupportedModelError, match="do 34,816 multiplications for 4 tokens, and 33,792 would be"):
        require_counted(model)


def test_what_cannot_be_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("needs more than tokens")

    model = build_model("llama")
    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.warns(ShrinkformerWarning, match=r"cannot be run without weights \(needs more than tokens\)"):
        require_counted(model)


def test_it_takes_no_memory_for_weights() -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "vocab_size": 32000}
    with torch.device("meta"):
        model = LlamaForCausalLM(build_model("llama").config.__class__(**sizes, num_hidden_layers=22))
    require_counted(model)
    assert all(weight.is_meta for weight in without_weights(model).parameters())


def test_mixed_attention_is_refused_for_what_runs_block_by_block(examples: list[dict[str, Any]]) -> None:
    model = build_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert len(layer_views(model)) == 3  # sizes can be told all the same
    with pytest.raises(UnsupportedModelError, match=r"full_attention, sliding_attention in layer_types\); to prune or"):
        calibrate(model, examples, method="stat")
