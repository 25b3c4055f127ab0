"""``--resume`` with other flags: what does not depend on them is taken up, and the result is that of a fresh run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shrinkformer.commands import prune_opt, pruning, quantize_opt
from shrinkformer.prune.resume import BlockStore
from tests.test_prune_opt import checkpoint, text, write_corpora

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call a command in a folder with a checkpoint, ``mine``, and data."""
    write_corpora(tmp_path / "data")
    checkpoint(tmp_path / "mine", num_hidden_layers=2)
    monkeypatch.chdir(tmp_path)
    common = ["--model_name", "mine", "--data_dir", "data", "--sequence_length", "24", "--sample_batch_size", "16"]
    return lambda *more, main=prune_opt.main: main([*common, "--method", "stat", "--mu", "0.5", *more])


@pytest.fixture
def interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A run that ended when its checkpoint was to be saved; counts what is found from now on."""
    with monkeypatch.context() as patch:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(pruning, "save", stop)
        assert run() == 130
    counts = {"moments": 0}
    write = BlockStore.write

    def counting(self: BlockStore, *more: Any) -> None:
        counts["moments"] += 1
        write(self, *more)

    monkeypatch.setattr(BlockStore, "write", counting)
    return counts


def results(output: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    record = json.loads((Path(output) / "opt/mine.jsonl").read_text().splitlines()[-1])
    folder = Path(record["save_dir"])
    files = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    return {side: record[side]["metrics"] for side in ("dense", "pruned", "quantized") if side in record}, files


@pytest.mark.parametrize(
    ("flags", "again", "moments"),
    [
        (["--evaluation_windows", "3"], "metrics of the dense model, finished budgets; the rest is taken up", 0),
        (["--search_seconds", "7"], "finished budgets; the rest is taken up", 0),
        (["--batch_size", "3"], "metrics of the dense model, finished budgets", 2),
    ],
)
def test_equal_to_a_fresh_run(
    flags: list[str],
    again: str,
    moments: int,
    run: Run,
    interrupted: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert run("--resume", *flags) == 0
    news = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--resume: ")]
    assert len(news) == 1
    assert f"{flags[0]} " in news[0].partition("found anew")[0]
    assert news[0].endswith(again)
    assert interrupted["moments"] == moments
    assert run("--output_dir", "fresh", *flags) == 0
    assert results("output") == results("fresh")


def test_other_evaluation_texts(run: Run, interrupted: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    (Path("data") / "ptb/test.txt").write_text(text(900, 77))
    assert run("--resume") == 0
    assert "begun with other evaluation examples, so these are found anew: metrics of" in capsys.readouterr().out
    assert interrupted["moments"] == 0
    assert run("--output_dir", "fresh") == 0
    assert results("output") == results("fresh")


def test_where_reports_go_and_who_is_told_changes_nothing(
    run: Run, interrupted: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("--resume", "--save_dir", "elsewhere", "--min_neurons", "2") == 0
    assert "--resume: begun" not in capsys.readouterr().out
    assert interrupted["moments"] == 0
    assert (Path("elsewhere") / "model.safetensors").exists()


def test_quantizing_what_pruning_learnt(
    run: Run, interrupted: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--bits", "4", "--group_size", "16", "--round_to", "16", "--format", "float"]
    assert run("--resume", "--batch_size", "8", *flags, main=quantize_opt.main) == 0
    assert interrupted["moments"] == (0 if "--whole_heads" not in capsys.readouterr().out else 2)
    assert run("--output_dir", "fresh", *flags, main=quantize_opt.main) == 0
    assert results("output") == results("fresh")


def test_other_examples_are_refused(run: Run, interrupted: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--resume", "--seed", "3") == 2
    assert "begun with other calibration examples and --seed 0 (now 3)" in capsys.readouterr().err
    assert interrupted["moments"] == 0


def test_damaged_figures_of_the_dense_model(
    run: Run, interrupted: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    values = Path("output/opt/mine-wikitext2.resume/values.jsonl")
    entries = [json.loads(line) for line in values.read_text().splitlines()]
    changed = [entry | {"value": {}} if entry["name"].startswith("metrics") else entry for entry in entries]
    values.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    assert run("--resume") == 2
    assert "no figures of an evaluation" in capsys.readouterr().err
    assert interrupted["moments"] == 0
