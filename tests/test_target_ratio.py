"""``--target_ratio`` through the commands: bytes on disk, reports, loading again, bad input."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import shrinkformer
from shrinkformer.commands import quantize_bert, quantize_opt, running, target_ratio
from shrinkformer.efficiency.size import folder_bytes
from shrinkformer.prune.budget import Budget
from shrinkformer.quantize.byte_budget import Compressed
from shrinkformer.quantize.byte_search import Mixture
from shrinkformer.quantize.config import QuantizeConfig, Quantized
from tests.test_prune_opt import call, checkpoint, read_records, write_corpora
from tests.test_streamed import (
    encoder_command,
    encoder_data,  # noqa: F401  (a fixture)
)

COMMON = ("--sample_batch_size", "16", "--evaluation_windows", "4", "--group_size", "8", "--round_to", "8")
QUICK = ("--search_seconds", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("data"))


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one model in it."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "mine", hidden_size=64, intermediate_size=128, word_embed_proj_dim=64)
    return tmp_path


def quantize(data: Path, *arguments: str) -> int:
    return call(quantize_opt.main, data, "--model_name", "mine", *COMMON, *QUICK, *arguments)


def test_decoder(inside: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(data, "--target_ratio", "0.25") == 0
    (record,) = read_records(Path("output"))
    assert record["target_ratio"] == 0.25
    assert record["method"] == "shrink"
    assert record["ratio"]["bytes"] <= 0.25
    assert record["mu"] == record["ratio"]["macs"] < 1
    assert record["quantized"]["bits"] is None
    assert len({row["bits"] for row in record["quantized_layers"]}) > 1
    folder = Path(record["save_dir"])
    assert folder_bytes(folder) == record["quantized"]["bytes"]
    assert folder_bytes(folder) <= 0.25 * folder_bytes("mine")
    assert folder.name == "mine-wikitext2-bytes0.25"
    assert shrinkformer.load(folder, dtype=torch.float32).config.shrinkformer
    assert "it gives equal outputs" in capsys.readouterr().out
    assert "target ratio 0.25, method shrink" in (Path("output") / "opt" / "mine.txt").read_text()


def test_encoder(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    command = encoder_command(tmp_path, request.getfixturevalue("encoder_data"))
    place = command.index("--mu")
    arguments = [*command[:place], *command[place + 2 :], *COMMON[-4:], *QUICK, "--target_ratio", "0.4"]
    assert quantize_bert.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads(next((tmp_path / "out").rglob("*.jsonl")).read_text().splitlines()[-1])
    assert record["ratio"]["bytes"] <= 0.4
    assert {"accuracy", "accuracy_stderr"} <= set(record["quantized"]["metrics"])


def test_dry_run(inside: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(data, "--target_ratio", "0.25", "--dry_run") == 0
    output = capsys.readouterr().out
    assert "target ratio 0.25: at most 0." in output
    assert "method shrink" in output
    assert not Path("output").exists()


class _Uncounted:
    """Forgets 100 bytes."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def plans(self, allowed: int) -> list[Mixture]:
        self.asked.append(allowed)
        return [Mixture({}, 0.0, allowed)]

    def best(self, mixtures: Sequence[Mixture]) -> Compressed:
        return Compressed(cast("Any", mixtures[0].bytes + 100), Quantized({}, [], QuantizeConfig()), None)


def test_a_file_that_is_too_large_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(_session: object, _budget: object, size: int, *_: object) -> Path:
        (tmp_path / "model.safetensors").write_bytes(bytes(size))
        return tmp_path

    monkeypatch.setattr(target_ratio, "save_formats", write)
    compressor, session = _Uncounted(), SimpleNamespace(job=SimpleNamespace(say=lambda _: None))
    found, folder = target_ratio._within(cast("Any", compressor), cast("Any", session), Budget(1.0, 8.0), 1000, {})
    assert compressor.asked == [1000, 900]
    assert folder_bytes(folder) == 1000 == found.model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target_ratio", "0"), "--target_ratio 0: must be between 0 and 1"),
        (("--target_ratio", "1.5"), "--target_ratio 1.5: must be between 0 and 1"),
        (
            ("--target_ratio", "0.2", "--mu", "1"),
            "--target_ratio 0.2 chooses how much of every block stays; leave --mu",
        ),
        (("--target_ratio=0.2", "--bits=4"), "--target_ratio 0.2 chooses the bits of every layer; leave --bits out"),
        (("--target_ratio", "0.2", "--also", "head"), "--target_ratio 0.2 chooses whether embeddings and head"),
        (("--target_ratio", "0.2", "--method", "stat"), "--target_ratio 0.2 prunes by method shrink"),
        (("--target_ratio", "0.2", "--resume"), "--target_ratio 0.2 begins with a search"),
        (("--target_ratio", "0.2", "--format", "gptq"), "--target_ratio 0.2: --format gptq holds one number of bits"),
        (("--target_ratio", "0.2", "--format", "float"), "--target_ratio 0.2: --format float stores no integers"),
        (("--target_ratio", "0.2", "--asymmetric"), "--target_ratio 0.2: no reader takes zero points"),
        (("--target_ratio", "0.001"), "--target_ratio 0.001: the smallest model takes 0."),
        (("--target_ratio", "0.2", "--max_memory", "0.0001"), "--max_memory: --target_ratio measures whole models"),
    ],
)
def test_one_line_before_the_model_is_loaded(
    inside: Path,
    data: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(running, "load_model")
    assert quantize(data, *arguments) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"quantize_opt.py: error: {message}")


def test_conv1d_is_refused(inside: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(inside / "mine", "gpt2")
    assert quantize(data, "--target_ratio", "0.2") == 2
    assert "is a Conv1D, which readers of --format compressed-tensors do not know" in capsys.readouterr().err
