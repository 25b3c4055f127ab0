"""Weights in several files, as the hub has them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from shrinkformer.errors import CheckpointError
from shrinkformer.prune.shards import ShardWriter
from tests.conftest import build_model

INDEX = "model.safetensors.index.json"


def write(folder: Path, tensors: dict[str, torch.Tensor], limit: float = 5e9) -> list[Path]:
    writer = ShardWriter(folder, limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("limit", [20e3, 5e9])
def test_transformers_loads_what_was_written(limit: float, tmp_path: Path) -> None:
    model = build_model()
    files = write(tmp_path, model.state_dict(), limit)
    model.config.save_pretrained(tmp_path)
    assert len(files) == (1 if limit > 1e6 else len(list(tmp_path.glob("model-*-of-*.safetensors"))))
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_index_is_the_one_of_transformers(tmp_path: Path) -> None:
    model = build_model("opt")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    files = write(tmp_path / "ours", tensors, 30e3)
    theirs, ours = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("theirs", "ours"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert list(ours["weight_map"]) == sorted(ours["weight_map"])
    assert [file.name for file in files] == sorted(set(ours["weight_map"].values()))
    for file in files:
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            names = list(shard.keys())
            assert sum(tensors[name].nbytes for name in names) <= 30e3
        assert all(ours["weight_map"][name] == file.name for name in names)
    model.config.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_files_are_cut_before_they_are_too_large(tmp_path: Path) -> None:
    sizes = {"a": 3, "b": 1, "c": 1, "large": 9, "d": 4}
    files = write(tmp_path, {name: torch.ones(size) for name, size in sizes.items()}, limit=4 * 4)
    assert names_in(tmp_path) == [*(f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)), INDEX]
    contents = []
    for file in files:
        with safe_open(file, framework="pt") as shard:
            contents.append(sorted(shard.keys()))
    assert contents == [["a", "b"], ["c"], ["large"], ["d"]]


def test_finished_files_are_out_of_memory(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 100)
    for index in range(10):
        writer.add(f"{index}", torch.ones(20))
        assert len(writer._pending) == 1


def test_earlier_weights_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(8), "b": torch.zeros(8)}, limit=32)
    (tmp_path / "model.txt").touch()
    write(tmp_path, {"c": torch.zeros(8)})
    assert names_in(tmp_path) == ["model.safetensors", "model.txt"]
    write(tmp_path, {"a": torch.zeros(8), "b": torch.zeros(8), "c": torch.zeros(8)}, limit=32)
    assert "model.safetensors" not in names_in(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4)
    parameter = torch.nn.Parameter(whole)
    (file,) = write(tmp_path, {"rows": parameter[:2], "rest": whole[1:], "columns": whole.T})
    with safe_open(file, framework="pt") as shard:
        assert shard.get_tensor("rows").equal(whole[:2])
        assert shard.get_tensor("rest").equal(whole[1:])
        assert shard.get_tensor("columns").equal(whole.T)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights were passed"):
        ShardWriter(tmp_path).finish()
    writer = ShardWriter(tmp_path, 16)
    for name in ("first", "second", "third"):
        writer.add(name, torch.zeros(4))
    for name in ("first", "third"):
        with pytest.raises(CheckpointError, match=f"{name} would be written .* twice"):
            writer.add(name, torch.zeros(4))
