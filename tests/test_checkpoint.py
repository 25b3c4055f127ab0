"""The checkpoint contract: an ordinary Hugging Face folder that loads with and without this package."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, BertModel, pipeline

from shrinkformer.architectures import layer_views, unit_columns
from shrinkformer.errors import CheckpointError
from shrinkformer.prune import pruned_modeling
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.refit import slice_consumer
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.surgery import Weights, rebuild, remove_heads
from tests.conftest import FAMILIES, WITHOUT_US, build_model, build_tokenizer, make_batches

# Runs where shrinkformer cannot be imported, as on a machine that has transformers only.
ELSEWHERE = (
    WITHOUT_US
    + """
folder, auto, reference, again = sys.argv[1:]
batch, expected = torch.load(reference, weights_only=True)
for attention in ("eager", "sdpa"):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, attn_implementation=attention)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch)[0], expected[attention]), attention
model.save_pretrained(again)  # what someone who fine-tunes it further would do
model = getattr(transformers, auto).from_pretrained(again, trust_remote_code=True, attn_implementation="sdpa")
with torch.no_grad():
    assert torch.equal(model.eval()(**batch)[0], expected["sdpa"])
"""
)

GENERATES = (
    ELSEWHERE
    + """
for cached in (True, False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = model.generate(batch["input_ids"][:, :3], do_sample=True, max_new_tokens=16, use_cache=cached)
    assert torch.equal(tokens, expected["tokens"]), cached
"""
)

AUTO = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Model": "AutoModel",
}


@pytest.fixture
def pruned(batches: list[dict[str, Any]]) -> Pruned:
    return prune_model(build_model(), batches, mu=0.5, method="stat-bias")


def outputs_by_attention(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model computes with either implementation of attention; it is left with the second."""
    expected = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            expected[attention] = model(**batch)[0]
    return expected


def run_elsewhere(
    program: str, result: Pruned, auto: str, *, batch: Any, expected: dict[str, torch.Tensor], folder: Path
) -> None:
    """Save a model, and compare its outputs with those of a process that cannot import this package."""
    small = save(result.model, folder / "small", plan=result.plan)
    torch.save((batch, expected), folder / "reference.pt")
    arguments = [str(small), auto, str(folder / "reference.pt"), str(folder / "again")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(load(folder / "again").eval()(**batch)[0], expected["sdpa"])


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_where_this_package_is_not_installed(family: str, tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    head = list(AUTO)[list(FAMILIES).index(family) % len(AUTO)]
    result = prune_model(build_model(family, head), batches, mu=0.5, method="stat-bias")
    expected = outputs_by_attention(result.model, batches[0])
    run_elsewhere(ELSEWHERE, result, AUTO[head], batch=batches[0], expected=expected, folder=tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_generate_where_this_package_is_not_installed(
    family: str, tmp_path: Path, batches: list[dict[str, Any]]
) -> None:
    result = prune_model(build_model(family), batches, mu=0.5, method="stat-bias")
    expected = outputs_by_attention(result.model, batches[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = batches[0]["input_ids"][:, :3]
        expected["tokens"] = result.model.generate(prompts, do_sample=True, max_new_tokens=16)
    run_elsewhere(GENERATES, result, "AutoModelForCausalLM", batch=batches[0], expected=expected, folder=tmp_path)


def test_the_folder_holds_what_others_expect(pruned: Pruned, tmp_path: Path) -> None:
    folder = save(pruned.model, tmp_path / "small", plan=pruned.plan, tokenizer=build_tokenizer(), card="# A card")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "pruned_modeling.py"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["shrinkformer"]["plan"]["mu"] == 0.5
    assert config["shrinkformer"]["layers"] == [
        {
            "heads": len(layer.heads),
            "neurons": len(layer.neurons),
            "query_width": layer.query_width or 8,
            "value_width": layer.value_width or 8,
        }
        for layer in pruned.plan.layers
    ]
    assert Plan.from_json((folder / "shrinkformer_plan.json").read_text()) == pruned.plan
    upstream = AutoConfig.from_pretrained(folder).per_layer_config
    assert [layer.intermediate_size for layer in upstream] == pruned.plan.neurons
    assert [layer.num_attention_heads for layer in upstream] == pruned.plan.heads
    with safe_open(folder / "model.safetensors", "pt") as file:
        shape = file.get_slice("bert.encoder.layer.0.intermediate.dense.weight").get_shape()
    assert shape == [pruned.plan.neurons[0], 32]


def test_remote_code_is_the_packages_own_file(pruned: Pruned, tmp_path: Path) -> None:
    folder = save(pruned.model, tmp_path / "small")
    assert (folder / "pruned_modeling.py").read_text() == Path(pruned_modeling.__file__).read_text()
    assert "shrinkformer." not in "".join(
        line for line in (folder / "pruned_modeling.py").read_text().splitlines() if "import" in line
    )


def test_stock_classes_refuse_rather_than_load_wrong_sizes(pruned: Pruned, tmp_path: Path) -> None:
    folder = save(pruned.model, tmp_path / "small")
    with pytest.raises(Exception, match=r"per-layer|size mismatch|trust_remote_code"):
        AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)


def test_saving_again_replaces_only_our_own(pruned: Pruned, tmp_path: Path) -> None:
    save(pruned.model, tmp_path / "small")
    save(pruned.model, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]  # no scratch folder left
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("x")
    with pytest.raises(CheckpointError, match="thesis exists and is not a checkpoint of shrinkformer"):
        save(pruned.model, other)
    assert (other / "chapter1.tex").exists()


def test_a_failed_save_leaves_nothing(pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pruned.model), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save(pruned.model, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_survives(pruned: Pruned, tmp_path: Path) -> None:
    model = pruned.model.half()
    folder = save(model, tmp_path / "small")
    assert load(folder).dtype == torch.float16
    batch = make_batches([7], batch_size=1)[0]
    assert torch.equal(load(folder, dtype=torch.float32).eval()(**batch)[0], model.float()(**batch)[0])


def test_loading_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)
    build_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="was not pruned by shrinkformer"):
        load(tmp_path / "dense")


def test_only_names_of_stock_models_become_classes() -> None:
    with pytest.raises(AttributeError):
        _ = pruned_modeling.NoSuchModel
    with pytest.raises(AttributeError):
        _ = pruned_modeling.AutoModel
    assert pruned_modeling.BertModel is pruned_modeling.BertModel
    assert issubclass(pruned_modeling.BertModel, BertModel)
    assert pruned_modeling.BertModel is not BertModel


def test_a_config_that_names_something_else_is_refused(pruned: Pruned, tmp_path: Path) -> None:
    folder = save(pruned.model, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["logging"]}))
    with pytest.raises(CheckpointError, match="names 'logging', which is no model of transformers"):
        load(folder)


def test_pipelines_take_it(tmp_path: Path, batches: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    result = prune_model(build_model(), batches, mu=0.5, method="stat-bias")
    folder = save(result.model, tmp_path / "small", tokenizer=build_tokenizer())
    with caplog.at_level("WARNING", logger="transformers"):
        answer = pipeline("text-classification", model=str(folder), trust_remote_code=True)("the cat sees a dog")
    assert 0.5 <= answer[0]["score"] <= 1
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(("family", "narrower"), [("bert", True), ("llama", True), ("gpt_neox", False)])
def test_sizes_that_transformers_has_no_words_for(
    family: str, narrower: bool, tmp_path: Path, batches: list[dict[str, Any]]
) -> None:
    """All heads and neurons stay, heads are narrower; or only heads go, of a family whose heads it cannot count."""
    model = build_model(family)
    for view in layer_views(model):
        size, record = layer_sizes([view])[0], view.architecture.attention
        if narrower:
            value, output = view.linear(record.value), view.linear(record.output)
            rows = unit_columns(torch.arange(size.heads), 8).reshape(size.heads, 8)[:, :5].reshape(-1)
            columns = unit_columns(torch.arange(size.heads * size.queries), 8).reshape(-1, 8)[:, :5].reshape(-1)
            filling = {
                record.value: Weights.rows(value, rows),
                record.output: Weights(output.weight[:, columns], output.bias),
            }
            rebuild(view, replace(size, value_width=5), filling)
        else:
            kept = torch.tensor([0, 2])
            remove_heads(view, kept, slice_consumer(view.attention_output, unit_columns(kept, 8)))
    again = load(save(model, tmp_path / "small")).eval()
    assert layer_sizes(layer_views(again)) == layer_sizes(layer_views(model))
    assert torch.equal(again(**batches[0])[0], model(**batches[0])[0])


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2"])
def test_one_token_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    """Weights in a file begin at any address, and products of one row round by address."""
    model = build_model(family, hidden_size=12, num_attention_heads=2, intermediate_size=7, num_hidden_layers=2)
    for seed in range(4):
        (batch,) = make_batches([1 + seed], batch_size=1, seed=seed)
        pruned = prune_model(model, [batch], mu=0.8, method="magnitude")
        again = load(save(pruned.model, tmp_path / f"small-{seed}", plan=pruned.plan)).eval()
        assert all(tensor.data_ptr() % 64 == 0 for tensor in again.state_dict().values())
        assert torch.equal(again(**batch)[0], pruned.model(**batch)[0])
