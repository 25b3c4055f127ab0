"""Models whose blocks are read one at a time: the same weights and outputs as when everything is loaded."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel, PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.errors import CheckpointError
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.lazy import OnDisk, load_lazily
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.shards import ShardWriter
from tests.conftest import FAMILIES, ROOT, build_model, make_batches

CLASSIFIER = AutoModelForSequenceClassification


def outputs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**make_batches([9, 5], batch_size=2)[0])[0]
    return result


def block_tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    return [tensor for view in layer_views(model) for tensor in (*view.block.parameters(), *view.block.buffers())]


def assert_same(lazy: PreTrainedModel, weights: OnDisk, expected: PreTrainedModel) -> None:
    """The same weights, types and outputs once all blocks are resident, and none of them before and afterwards."""
    assert type(lazy).__name__ == type(expected).__name__
    assert all(tensor.is_meta for tensor in block_tensors(lazy))
    assert not any(module.training for module in lazy.modules())
    with contextlib.ExitStack() as stack:
        for index in range(len(layer_views(lazy))):
            stack.enter_context(weights.resident(index))
        found, wanted = lazy.state_dict(), expected.state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].equal(tensor), name
        assert [p.requires_grad for p in lazy.parameters()] == [p.requires_grad for p in expected.parameters()]
        assert outputs(lazy).equal(outputs(expected.eval()))
    assert all(tensor.is_meta for tensor in block_tensors(lazy))
    inside = {id(tensor) for tensor in block_tensors(lazy)}
    assert not any(tensor.is_meta for tensor in (*lazy.parameters(), *lazy.buffers()) if id(tensor) not in inside)


def as_bin(folder: Path, tensors: dict[str, torch.Tensor], *, files: int = 1, **options: Any) -> None:
    """Replace the weights in a folder by ``.bin`` files."""
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return
    places = {name: f"pytorch_model-{index % files + 1:05d}.bin" for index, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: float = 1e9) -> None:
    """Replace the weights in a folder by others."""
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()


def untied(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights under one name each."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    rewrite(tmp_path, untied(model), shard_bytes=40e3)
    model.config.save_pretrained(tmp_path)
    lazy, weights = load_lazily(type(model), str(tmp_path), dtype=torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert isinstance(weights, OnDisk)
    assert_same(lazy, weights, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_type(dtype: torch.dtype, tmp_path: Path) -> None:
    build_model("opt").save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same(*load_lazily(AutoModelForCausalLM, str(tmp_path), dtype=dtype), expected)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"files": 3}], ids=str)
def test_bin_files(options: dict[str, Any], tmp_path: Path) -> None:
    model = build_model("opt")
    model.save_pretrained(tmp_path)
    as_bin(tmp_path, model.state_dict(), **options)
    before = sorted(tmp_path.iterdir())
    assert_same(*load_lazily(AutoModelForCausalLM, str(tmp_path), dtype=torch.float32), model)
    assert sorted(tmp_path.iterdir()) == before  # nothing is copied


class TestNames:
    """Stored under other names than the model has."""

    @pytest.mark.parametrize("family", ["opt", "llama", "bert"])
    def test_the_base_model_of_a_checkpoint_with_a_head(self, family: str, tmp_path: Path) -> None:
        build_model(family).save_pretrained(tmp_path)
        expected = AutoModel.from_pretrained(tmp_path)
        assert_same(*load_lazily(AutoModel, str(tmp_path), dtype=torch.float32), expected)

    def test_the_base_model_under_a_head(self, tmp_path: Path) -> None:
        model = build_model("opt")
        rewrite(tmp_path, model.model.state_dict())  # decoder.layers.0..., as facebook/opt-125m has it
        model.config.save_pretrained(tmp_path)
        assert_same(*load_lazily(AutoModelForCausalLM, str(tmp_path), dtype=torch.float32), model)

    def test_names_from_tensorflow(self, tmp_path: Path) -> None:
        model = build_model()
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in model.state_dict().items()
        }
        rewrite(tmp_path, renamed)
        model.config.save_pretrained(tmp_path)
        assert_same(*load_lazily(CLASSIFIER, str(tmp_path), dtype=torch.float32), model)

    def test_a_name_on_the_hub(self, tmp_path: Path) -> None:
        model = build_model()
        repository = tmp_path / "models--tester--tiny"
        model.save_pretrained(repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        assert_same(*load_lazily(CLASSIFIER, "tester/tiny", dtype=torch.float32, cache_dir=tmp_path), model)


class TestPruned:
    @pytest.mark.parametrize("sharded", [False, True])
    @pytest.mark.parametrize(
        ("family", "model_class"),
        [
            ("bert", CLASSIFIER),
            ("bert", transformers.BertForSequenceClassification),
            ("opt", AutoModelForCausalLM),
            ("llama", AutoModelForCausalLM),
        ],
    )
    def test_blocks_have_their_own_sizes(
        self, family: str, model_class: Any, sharded: bool, tmp_path: Path, batches: list[dict[str, Any]]
    ) -> None:
        folder = save(prune_model(build_model(family), batches, mu=0.5, method="stat-bias").model, tmp_path / "pruned")
        expected = load(folder)
        if sharded:
            rewrite(folder, untied(expected), shard_bytes=30e3)
        lazy, weights = load_lazily(model_class, str(folder), dtype=torch.float32, config=expected.config)
        assert len({view.neurons for view in layer_views(lazy)}) > 1
        assert_same(lazy, weights, expected)

    def test_a_class_of_this_package(self, tmp_path: Path, batches: list[dict[str, Any]]) -> None:
        folder = save(prune_model(build_model(), batches, mu=0.5, method="stat-bias").model, tmp_path / "pruned")
        expected = load(folder)
        lazy, weights = load_lazily(type(expected), str(folder), dtype=torch.float32)
        assert type(lazy) is type(expected)
        assert_same(lazy, weights, expected)


class TestResident:
    @pytest.fixture
    def lazy(self, tmp_path: Path) -> tuple[PreTrainedModel, OnDisk]:
        build_model("opt").save_pretrained(tmp_path)
        return load_lazily(AutoModelForCausalLM, str(tmp_path), dtype=torch.float32)

    def test_one_block_at_a_time(self, lazy: tuple[PreTrainedModel, OnDisk]) -> None:
        model, weights = lazy
        with weights.resident(1) as block:
            assert block is layer_views(model)[1].block
            there = [not next(view.block.parameters()).is_meta for view in layer_views(model)]
        assert there == [False, True, False]

    def test_again_inside_itself(self, lazy: tuple[PreTrainedModel, OnDisk]) -> None:
        model, weights = lazy
        with weights.resident(0) as block:
            before = block.fc1.weight
            with weights.resident(0), weights.resident(2):
                pass
            assert block.fc1.weight is before
            assert not before.is_meta
        assert all(tensor.is_meta for tensor in block_tensors(model))

    def test_changes_are_forgotten_also_after_an_error(self, lazy: tuple[PreTrainedModel, OnDisk]) -> None:
        model, weights = lazy
        with weights.resident(0) as block:
            original = block.fc1.weight.clone()
        with pytest.raises(ZeroDivisionError), weights.resident(0) as block:
            block.fc1.weight.data.zero_().tolist()[0][0] / 0
        assert all(tensor.is_meta for tensor in block_tensors(model))
        with weights.resident(0) as block:
            assert block.fc1.weight.equal(original)

    def test_weights_that_someone_keeps_stay_as_they_are(self, lazy: tuple[PreTrainedModel, OnDisk]) -> None:
        _, weights = lazy
        with weights.resident(0) as block:
            kept = block.fc1.weight
            copied = kept.clone()
        with weights.resident(1):
            assert kept.equal(copied)

    @pytest.mark.parametrize("change", ["smaller", "bias"])
    def test_a_block_of_another_shape(self, change: str, lazy: tuple[PreTrainedModel, OnDisk]) -> None:
        _, weights = lazy
        with weights.resident(0) as block:
            if change == "smaller":
                block.fc1 = nn.Linear(32, 5)
            else:
                block.self_attn_layer_norm.extra = nn.Parameter(torch.zeros(3))
        with pytest.raises(CheckpointError, match=r"block 0 has other tensors than .*change copies of blocks only"):
            weights.resident(0).__enter__()


class TestErrors:
    def test_a_block_is_missing(self, tmp_path: Path) -> None:
        model = build_model()
        model.config.save_pretrained(tmp_path)
        lacking = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.output" not in name}
        rewrite(tmp_path, lacking)
        with pytest.raises(
            CheckpointError, match=r"lacks bert\.encoder\.layer\.1\.output.* \(4 of 16 tensors of block 1"
        ):
            load_lazily(CLASSIFIER, str(tmp_path), dtype=torch.float32)

    def test_the_config_is_of_another_model(self, tmp_path: Path) -> None:
        model = build_model()
        model.save_pretrained(tmp_path)
        model.config.intermediate_size = 48
        _, weights = load_lazily(CLASSIFIER, str(tmp_path), dtype=torch.float32, config=model.config)
        with pytest.raises(CheckpointError, match=r"intermediate\.dense\.\w+: \(64"):
            weights.resident(0).__enter__()


def test_transformers_does_not_complain_of_blocks_that_stay_on_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    build_model(head="Model").save_pretrained(tmp_path)
    load_lazily(BertModel, str(tmp_path), dtype=torch.float32)
    assert not caplog.records


def test_a_head_is_not_made_up(tmp_path: Path) -> None:
    build_model(head="Model").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lack classifier\.bias and 1 other tensors"):
        load_lazily(CLASSIFIER, str(tmp_path), dtype=torch.float32)


PEAK = """
import sys, torch
from shrinkformer.prune.lazy import load_lazily
from transformers import AutoModelForCausalLM

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

before = memory("VmRSS")
model, weights = load_lazily(AutoModelForCausalLM, sys.argv[1], dtype=torch.float32)
for index in range(int(sys.argv[2])):
    with weights.resident(index) as block:
        sum(parameter.sum() for parameter in block.parameters())
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    layers, width = 24, 1024
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    build_model("opt", **sizes, word_embed_proj_dim=width).half().save_pretrained(tmp_path, max_shard_size="200MB")
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(layers)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    shutil.rmtree(tmp_path)
    block = 12 * width**2 * 4  # bytes; the embeddings are tiny here
    assert int(result.stdout) < 3 * block  # half a gigabyte is stored, a whole one were all blocks loaded
