"""What stands beside the weights goes with them: pruned, quantized, streamed, exported, loaded and saved."""

import json
from pathlib import Path

import pytest
import torch

import shrinkformer
from shrinkformer.commands import prune_opt, quantize_opt
from shrinkformer.commands.main import main
from shrinkformer.prune.side_files import add_side_files
from tests.conftest import build_model, build_tokenizer
from tests.test_prune_opt import call, checkpoint, write_corpora

GENERATION = {"do_sample": True, "temperature": 0.6, "eos_token_id": [0, 5], "pad_token_id": 0}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
COPIED = ("preprocessor_config.json", "LICENSE", "NOTICE.txt", "vocab.txt", "special_tokens_map.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with an instruct model and everything that comes with one."""
    folder = tmp_path_factory.mktemp("world")
    write_corpora(folder / "data")
    model = folder / "mine"
    checkpoint(model, "llama", hidden_size=64, intermediate_size=128)
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    for name in COPIED:
        (model / name).write_text("{}" if name.endswith(".json") else name)
    (model / "training_args.bin").write_bytes(b"not ours to spread")
    return folder


def require_all(folder: Path) -> None:
    found = json.loads((folder / "generation_config.json").read_text())
    assert {name: found[name] for name in GENERATION} == GENERATION
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", *COPIED))
    assert not (folder / "training_args.bin").exists()


@pytest.mark.parametrize("memory", [(), ("--max_memory", "0.0001")], ids=["in memory", "streamed"])
@pytest.mark.parametrize("kind", ["pruned", "compressed-tensors", "gptq", "float"])
def test_by_command(
    world: Path, kind: str, memory: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    common = ("--model_name", "mine", "--sample_batch_size", "4", "--evaluation_windows", "2", *memory)
    places = ("--save_dir", str(tmp_path / "made"), "--output_dir", str(tmp_path / "output"))
    if kind == "pruned":
        command, own = prune_opt.main, ("--mu", "0.6", "--method", "stat")
    else:
        command, own = quantize_opt.main, ("--group_size", "32", "--quantizer", "rtn", "--format", kind)
    assert call(command, world / "data", *common, *own, *places) == 0
    require_all(tmp_path / "made")
    model = shrinkformer.load(tmp_path / "made")
    assert (model.generation_config.eos_token_id, model.generation_config.temperature) == ([0, 5], 0.6)
    if not memory and kind in {"pruned", "compressed-tensors"}:
        assert main(["export", str(tmp_path / "made"), "--output", str(tmp_path / "exported")]) == 0
        require_all(tmp_path / "exported")
        shrinkformer.save(model.to(torch.float32), tmp_path / "again", extras_from=tmp_path / "made")
        require_all(tmp_path / "again")  # the tokenizer's files are copied where none is given


def test_what_is_written_stays_and_what_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    (source / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    (source / "tokenizer.model").write_text("pieces")
    add_side_files(folder, build_model("bert"), source=source, tokenizer=build_tokenizer())
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 64
    assert (folder / "tokenizer.model").read_text() == "pieces"
    assert not (folder / "generation_config.json").exists()  # an encoder generates nothing
    (tmp_path / "secret.json").write_text("{}")
    (source / "preprocessor_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(shrinkformer.errors.CheckpointError, match="link to outside"):
        add_side_files(folder, build_model("bert"), source=source, tokenizer=None)
