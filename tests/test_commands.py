"""`prune_bert.py` as users call it: results, reports, and what it says when something is wrong."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from shrinkformer.architectures import layer_views
from shrinkformer.commands.prune_bert import main
from shrinkformer.efficiency.rounding import Rounding
from shrinkformer.prune.checkpoint import load
from tests.conftest import ROOT, WORDS, build_model, build_tokenizer


def sentences(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(3, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2, QQP, STS-B and SQuAD in miniature, in the layout of a real data folder."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, size, seed in (("train", 80, 1), ("validation", 40, 2)):
        first, second = sentences(size, seed), sentences(size, seed + 10)
        label = rng.integers(0, 2, size).tolist()
        tables: dict[str, dict[str, Any]] = {
            "glue/sst2": {"sentence": first, "label": label},
            "glue/qqp": {"question1": first, "question2": second, "label": label},
            "glue/stsb": {"sentence1": first, "sentence2": second, "label": rng.uniform(0, 5, size).tolist()},
            "squad": {
                "id": [str(index) for index in range(size)],
                "title": ["t"] * size,
                "context": [" ".join([text] * 12) for text in first],
                "question": second,
                "answers": [{"text": [text.split()[1]], "answer_start": [text.index(" ") + 1]} for text in first],
            },
        }
        for name, table in tables.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(table).to_parquet(folder / name / f"{split}.parquet")
    return folder


@pytest.fixture
def run(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the command in an empty folder; returns exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str) -> int:
        base = ["--data_dir", str(data_dir), "--sample_batch_size", "48", "--method", "stat-bias"]  # fast
        return main([*base, *arguments])

    return call


def checkpoint(folder: Path, family: str = "bert", head: str = "ForSequenceClassification", **sizes: Any) -> str:
    build_model(family, head, **sizes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def records(tmp_path: Path, task: str) -> list[dict[str, Any]]:
    files = list((tmp_path / "output").glob(f"*/{task}.jsonl"))
    assert len(files) == 1
    return [json.loads(line) for line in files[0].read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "model", "metric"),
    [
        ("sst2", ("bert", "ForSequenceClassification", {}), "accuracy"),
        ("qqp", ("distilbert", "ForSequenceClassification", {}), "f1"),
        ("stsb", ("roberta", "ForSequenceClassification", {"num_labels": 1}), "spearmanr"),
        ("squad", ("distilbert", "ForQuestionAnswering", {}), "exact_match"),
        ("squad", ("roberta", "ForQuestionAnswering", {}), "f1"),
        ("similarity", ("bert", "Model", {}), "pearson"),
    ],
)
def test_every_kind_of_task(run: Any, tmp_path: Path, task: str, model: tuple[Any, ...], metric: str) -> None:
    family, head, sizes = model
    name = checkpoint(tmp_path / "mine", family, head, **sizes)
    assert run("--model_name", name, "--task_name", task, "--mu", "0.5") == 0
    (record,) = records(tmp_path, task)
    assert metric in record["dense"]["metrics"]
    assert metric in record["pruned"]["metrics"]
    assert 0.4 < record["ratio"]["macs"] <= 0.5
    assert load(record["save_dir"]).base_model is not None


def test_report_contract(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = checkpoint(tmp_path / "models" / "tiny" / "sst2")
    assert run("--model_name", "tiny", "--task_name", "sst2", "--mu", "0.6", "0.4", "1") == 0
    first, second, dense_only = records(tmp_path, "sst2")
    assert Path(name) == tmp_path / "models/tiny/sst2"
    for record, mu in ((first, 0.6), (second, 0.4)):
        assert record["model_name"], record["mu"] == ("tiny", mu)
        assert set(record["dense"]) == set(record["pruned"]) == {"metrics", "macs", "parameters", "bytes", "latency_ms"}
        assert set(record["ratio"]) == {"macs", "parameters", "bytes", "latency"}
        wanted = {"calibration", "selection", "allocation", "refit", "evaluation", "total"}
        assert wanted <= set(record["seconds"])
        assert set(record["dense"]["latency_ms"]) == {"1x64", "8x64"}  # as long as the tokenizer allows
        assert [set(layer) for layer in record["layers"]] == [
            {"layer", "heads", "neurons", "attention_error", "ffn_error"}
        ] * 3
        assert record["ratio"]["macs"] <= mu
        assert record["ratio"]["latency"] == pytest.approx(
            record["pruned"]["latency_ms"]["8x64"] / record["dense"]["latency_ms"]["8x64"]
        )
        assert record["dense"]["metrics"]["accuracy_stderr"] > 0
        assert record["calibration_tokens"] > 0
        assert record["peak_memory_bytes"] > 0
        assert record["schema"] == 1
        assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert "pruned" not in dense_only
    assert "ratio" not in dense_only
    text = (tmp_path / "output/tiny/sst2.txt").read_text()
    page = (tmp_path / "output/tiny/sst2.html").read_text()
    assert "What each layer kept" in page
    assert "3 runs in all" in page
    shown = capsys.readouterr().out
    for line in ("accuracy", "MACs", "parameters", "file size", "latency", "attention error"):
        assert line in text
        assert line in shown


def test_several_budgets_equal_single_runs(run: Any, tmp_path: Path) -> None:
    name = checkpoint(tmp_path / "mine")
    common = ("--model_name", name, "--task_name", "sst2", "--mu")
    assert run(*common, "0.7", "0.4") == 0
    assert run(*common, "0.4") == 0
    _, together, alone = records(tmp_path, "sst2")
    assert together["layers"] == alone["layers"]
    assert together["pruned"]["metrics"] == alone["pruned"]["metrics"]


def test_shrink_reports_and_saves_narrow_heads(run: Any, tmp_path: Path) -> None:
    common = ("--model_name", checkpoint(tmp_path / "mine"), "--task_name", "sst2", "--mu", "0.4", "--method", "shrink")
    assert run(*common, "--search_seconds", "2", "--save_dir", "small") == 0
    assert run(*common, "--search_seconds", "0", "--whole_heads", "--save_dir", "whole") == 0
    narrow, whole = records(tmp_path, "sst2")
    assert narrow["method"] == "shrink"
    assert narrow["ratio"]["macs"] <= 0.4
    assert any("value_width" in layer for layer in narrow["layers"])
    assert not any("value_width" in layer for layer in whole["layers"])
    widths = [(view.query_width, view.value_width) for view in layer_views(load(tmp_path / "small"))]
    assert widths == [(layer.get("query_width", 8), layer.get("value_width", 8)) for layer in narrow["layers"]]


def test_batch_size_changes_nothing(run: Any, tmp_path: Path) -> None:
    name = checkpoint(tmp_path / "mine")
    for size in ("1", "48"):
        assert run("--model_name", name, "--task_name", "qqp", "--mu", "0.5", "--batch_size", size) == 0
    small, large = records(tmp_path, "qqp")
    assert [layer["neurons"] for layer in small["layers"]] == [layer["neurons"] for layer in large["layers"]]
    assert small["pruned"]["metrics"] == pytest.approx(large["pruned"]["metrics"], abs=0.026)


def test_own_calibration_file(run: Any, tmp_path: Path) -> None:
    name = checkpoint(tmp_path / "mine")
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in sentences(60, 5)))
    assert run("--model_name", name, "--task_name", "sst2", "--mu", "0.5", "--calibration_file", str(file)) == 0


def test_a_pruned_checkpoint_can_be_pruned_again(run: Any, tmp_path: Path) -> None:
    name = checkpoint(tmp_path / "mine")
    once, twice = str(tmp_path / "once"), str(tmp_path / "twice")
    assert run("--model_name", name, "--task_name", "sst2", "--mu", "0.7", "--save_dir", once) == 0
    assert run("--model_name", once, "--task_name", "sst2", "--mu", "0.7", "--save_dir", twice) == 0
    assert sum(p.numel() for p in load(twice).parameters()) < sum(p.numel() for p in load(once).parameters())


def test_dry_run_computes_nothing(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = checkpoint(tmp_path / "mine")
    monkeypatch.delattr("shrinkformer.commands.running.load_model")  # no weight is read
    assert run("--model_name", name, "--task_name", "sst2", "--mu", "0.5", "--dry_run") == 0
    shown = capsys.readouterr().out
    for word in ("12 heads of 8", "mu 0.5", "MACs", "memory", "time"):
        assert word in shown
    assert not (tmp_path / "output").exists()


def test_dry_run_of_a_pruned_checkpoint(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = checkpoint(tmp_path / "mine")
    assert run("--model_name", name, "--task_name", "sst2", "--mu", "0.5", "--save_dir", "small") == 0
    kept = records(tmp_path, "sst2")[0]["pruned"]["macs"]
    capsys.readouterr()
    assert run("--model_name", "small", "--task_name", "sst2", "--mu", "0.5", "--dry_run") == 0
    assert f"of {kept / 1e6:.1f} M MACs" in capsys.readouterr().out


def test_round_to_what_is_measured(run: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = checkpoint(tmp_path / "mine")
    asked: list[tuple[Any, ...]] = []

    def measured(*sizes: int, **kind: Any) -> Rounding:
        asked.append((*sizes, kind))
        return Rounding(8, {1: 1.25, 8: 1.0})

    monkeypatch.setattr("shrinkformer.commands.running.choose_multiple", measured)
    flags = ("--model_name", name, "--task_name", "sst2", "--round_to", "auto")
    assert run(*flags, "--mu", "0.5", "--dry_run") == run(*flags, "--mu", "1") == 0
    assert "round to auto: is measured when the run begins" in capsys.readouterr().out
    assert not asked  # where nothing is pruned
    assert run(*flags, "--mu", "0.6", "0.5") == 0
    assert asked == [(32, 64, {"gated": False, "device": "cpu", "dtype": torch.float32})]
    dense, *pruned = records(tmp_path, "sst2")
    assert "round_to" not in dense
    for record in pruned:
        assert record["round_to"] == {"multiple": 8, "costs": {"1": 1.25, "8": 1.0}}
        assert {layer["neurons"] % 8 for layer in record["layers"]} == {0}
        assert record["ratio"]["macs"] <= record["mu"]
    shown = capsys.readouterr().out
    assert "--round_to auto: 8 (time per neuron by multiple: 1: 1.250, 8: 1.000)" in shown
    assert "neurons are multiples of 8 (" in shown


def test_save_dir_holds_one_folder_per_budget(run: Any, tmp_path: Path) -> None:
    name = checkpoint(tmp_path / "mine")
    arguments = ("--model_name", name, "--task_name", "sst2", "--mu", "0.7", "0.5", "--save_dir", "kept")
    assert run(*arguments) == 0
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"mu0.7", "mu0.5"}


BAD_INPUT = {
    "unknown task": (["--task_name", "sst3"], r"--task_name .*sst3.*sst2"),
    "mu of zero": (["--mu", "0"], r"--mu 0.0: must be in \(0, 1\]"),
    "mu above one": (["--mu", "1.2"], r"--mu 1.2: must be in \(0, 1\]"),
    "mu not a number": (["--mu", "half"], r"--mu.*half"),
    "less than no time": (["--search_seconds", "-1"], r"--search_seconds -1.0: must not be negative"),
    "unknown flag": (["--nu", "1"], r"--nu"),
    "unknown method": (["--method", "best"], r"--method 'best': choose one of .*stat"),
    "no data folder": (["--data_dir", "nowhere"], r"--data_dir nowhere: no such folder"),
    "no calibration file": (["--calibration_file", "x.txt"], r"--calibration_file x.txt: no such file"),
    "no model": (["--model_name", "nobody/nothing"], r"--model_name nobody/nothing: not in models/nobody/nothing/sst2"),
    "folder without model": (["--model_name", "empty"], r"--model_name empty: the folder empty has no config.json"),
    "label count": (["--model_name", "three"], r"--model_name three: the checkpoint has 3 label.*sst2 has 2"),
    "wrong head": (["--task_name", "squad"], r"--model_name mine: it is a BertForSequenceClassification.*squad"),
    "output is a file": (["--output_dir", "file"], r"--output_dir file: .*is a file"),
    "save is a file": (["--save_dir", "file/x"], r"--save_dir file/x: .*is a file"),
    "save over something else": (["--save_dir", "three"], r"--save_dir three: it holds something else"),
    "device": (["--device", "tpu9"], r"--device 'tpu9'"),
    "no cuda": (["--device", "cuda:99"], r"--device cuda:99: this machine has \d+ CUDA"),
    "too many samples": (["--sample_batch_size", "100000"], r"--sample_batch_size.*100000"),
    "no samples": (["--sample_batch_size", "0"], r"--sample_batch_size 0: must be at least 1"),
    "seed": (["--seed", "-1"], r"--seed -1"),
    "round_to": (["--round_to", "0"], r"--round_to 0"),
    "round_to a word": (["--round_to", "often"], r"--round_to 'often': give a whole number, or auto"),
    "sequence length": (["--sequence_length", "-3"], r"--sequence_length -3"),
    "unsupported family": (
        ["--model_name", "bloom"],
        r"--model_name bloom: model_type 'bloom' has no architecture record",
    ),
    "missing task data": (["--task_name", "rte"], r"rte"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Any, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = BAD_INPUT[case]
    checkpoint(tmp_path / "mine")
    checkpoint(tmp_path / "three", num_labels=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bloom").mkdir()
    (tmp_path / "bloom" / "config.json").write_text('{"model_type": "bloom", "architectures": ["BloomForCausalLM"]}')
    (tmp_path / "file").write_text("")
    before = set(tmp_path.iterdir())

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("shrinkformer.commands.running.load_model", never)
    capsys.readouterr()  # progress bars of the files made above
    assert run("--model_name", "mine", "--task_name", "sst2", *arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("prune_bert.py: error: ")
    assert __import__("re").search(message, line), line
    assert set(tmp_path.iterdir()) == before


def test_impossible_budget_fails_before_any_work(run: Any, tmp_path: Path, capsys: Any) -> None:
    name = checkpoint(tmp_path / "mine")
    assert run("--model_name", name, "--task_name", "sst2", "--mu", "0.5", "0.01") == 2
    assert "--mu 0.01 cannot be met" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert run("--output_dir", str(locked / "out")) == 2
    assert "no permission to write" in capsys.readouterr().err


def test_damaged_weights_are_one_line_before_anything_is_loaded(run: Any, tmp_path: Path, capsys: Any) -> None:
    name = checkpoint(tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"nonsense")
    assert run("--model_name", name, "--task_name", "sst2", "--mu", "0.5") == 2
    assert "model.safetensors cannot be read (a header of" in capsys.readouterr().err


def test_results_survive_a_later_failure(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The second budget fails while it is evaluated: the first report and both checkpoints stay."""
    from shrinkformer.commands import prune_bert
    from shrinkformer.errors import NumericalError

    name = checkpoint(tmp_path / "mine")
    real, calls = prune_bert.evaluate_model, []

    def fail_third(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise NumericalError("the outputs are NaN")
        return real(*arguments, **options)

    monkeypatch.setattr(prune_bert, "evaluate_model", fail_third)
    assert run("--model_name", name, "--task_name", "sst2", "--mu", "0.7", "0.5") == 1
    assert "the outputs are NaN" in capsys.readouterr().err
    (record,) = records(tmp_path, "sst2")
    assert record["mu"] == 0.7
    assert load(tmp_path / "output/mine/sst2-mu0.5") is not None


def test_the_script_at_the_top_level() -> None:
    done = subprocess.run(
        [sys.executable, "prune_bert.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--mu" in done.stdout
    bad = subprocess.run(
        [sys.executable, "prune_bert.py", "--mu", "7"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
