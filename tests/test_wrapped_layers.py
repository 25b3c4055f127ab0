"""Layers of a pruned model are ordinary ones: adapters, quantizers and tracers put others in their place."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shrinkformer.architectures import layer_views
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.pruned_modeling import set_block_sizes
from tests.conftest import build_model, make_batches

(BATCH,) = make_batches([7, 5, 9], batch_size=3)

MIXED = ("bert", "distilbert", "roberta", "electra", "opt")
"""Families whose queries can be narrowed as well as their values."""

GROUPED = ("llama", "mistral", "qwen2", "qwen3", "phi")

ATTENTION = {
    "bert": ["query", "key", "value", "attention.output.dense"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
FEED_FORWARD = {
    "bert": ["intermediate.dense", "output.dense"],
    "opt": ["fc1", "fc2"],
    "llama": ["up_proj", "down_proj"],
}


def narrowed(family: str, head: str | None = None) -> Any:
    """Values narrower than queries, queries narrower than values, and both narrower alike; weights are random."""
    model = build_model(family, head)
    widths = [(4, 6), (7, 3), (5, 5)] if family in MIXED else [(8, 6), (8, 3), (8, 8)]
    generator = torch.Generator().manual_seed(0)
    for view, (query, value) in zip(layer_views(model), widths, strict=True):
        sizes = {"heads": view.heads - 1, "neurons": 24, "query_width": query, "value_width": value}
        set_block_sizes(view.block, view.architecture.to_dict(), **sizes)
        for layer in (module for module in view.block.modules() if isinstance(module, nn.Linear)):
            layer.weight.data.normal_(std=0.2, generator=generator)
            if layer.bias is not None:
                layer.bias.data.normal_(std=0.1, generator=generator)
    return model.eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH)[0]


class Delegate(nn.Module):
    """What quantizers put in the place of a layer: it knows no shapes and has no hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden)


def heads_by_hand(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Attention of the first block of a BERT, without padding of tokens: each head with vectors of its own widths."""
    attention = layer_views(model)[0].block.attention
    query, key, value = (layer(hidden) for layer in (attention.self.query, attention.self.key, attention.self.value))
    query, key = (part.unflatten(-1, (-1, attention.self.query_width)).transpose(1, 2) for part in (query, key))
    value = value.unflatten(-1, (-1, attention.self.value_width)).transpose(1, 2)
    scores = torch.softmax(query @ key.mT * attention.self.scaling, -1)
    return (scores @ value).transpose(1, 2).flatten(-2)


def test_heads_of_two_widths_are_what_they_should_be() -> None:
    model = narrowed("bert", "Model")
    with torch.no_grad():
        hidden = model.embeddings(BATCH["input_ids"][2:])
        attention = layer_views(model)[0].block.attention.self
        assert (attention.query_width, attention.value_width) == (4, 6)
        assert torch.allclose(attention(hidden)[0], heads_by_hand(model, hidden), atol=1e-5)


@pytest.mark.parametrize("family", [*MIXED, *GROUPED])
def test_every_layer_may_be_replaced(family: str) -> None:
    model = narrowed(family)
    expected = outputs(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for view in layer_views(model):
        record = view.architecture
        for path in (*record.attention.producers, record.attention.output, record.feed_forward.output):
            view.block.set_submodule(path, Delegate(view.block.get_submodule(path)))
    assert torch.equal(outputs(model), expected)
    for part in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(part), expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_compiled_graph(family: str) -> None:
    model = narrowed(family)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(outputs(compiled), outputs(model))


def test_an_exported_program() -> None:
    model = narrowed("opt")
    program = torch.export.export(model, (), {**BATCH, "use_cache": False}, strict=False).module()
    assert torch.allclose(program(**BATCH, use_cache=False)[0], outputs(model), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace() -> None:
    model = narrowed("bert")
    model.set_attn_implementation("eager")
    traced = torch.jit.trace(model, tuple(BATCH.values()), strict=False)
    assert torch.allclose(traced(*BATCH.values())["logits"], outputs(model), atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(family: str, cache: str) -> None:
    model = narrowed(family)
    prompt = {name: tensor[1:2, :5] for name, tensor in BATCH.items()}
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    without = model.generate(**prompt, use_cache=False, **options)
    assert torch.equal(model.generate(**prompt, cache_implementation=cache, **options), without)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = narrowed("llama").train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_an_adapter_is_trained_and_merged(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = narrowed(family)
    before = outputs(model)
    targets = [*ATTENTION[family], *FEED_FORWARD[family]]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config)
    labels = torch.tensor([0, 1, 0]) if family == "bert" else BATCH["input_ids"]
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    adapted(**BATCH, labels=labels).loss.backward()
    optimizer.step()
    trained = outputs(adapted.eval())
    assert float((trained - before).abs().max()) > 1e-3
    merged = adapted.merge_and_unload()
    assert torch.allclose(outputs(merged), trained, atol=1e-4)
    save(merged, tmp_path / "merged")
    assert torch.equal(outputs(load(tmp_path / "merged").eval()), outputs(merged))
