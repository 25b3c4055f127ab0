"""`prune_opt.py` and `opt_eval.py` as users call them: results, reports, and what they say when something is wrong."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import shrinkformer
from shrinkformer.commands import opt_eval, prune_opt, running, tracking
from shrinkformer.commands.report import Run
from shrinkformer.dataset.corpora import evaluation_windows
from shrinkformer.dataset.corpus import CORPORA
from shrinkformer.efficiency.size import count_parameters, folder_bytes
from shrinkformer.evaluate.perplexity import evaluate_perplexity
from shrinkformer.prune.plan import Plan
from tests.conftest import WORDS, build_model, build_tokenizer

LENGTH = 24
BUDGETS = (0.7, 0.5, 1.0)
METRICS = {f"perplexity{suffix}" for suffix in ("", *(f"_{name}" for name in CORPORA))}

Main = Callable[[Sequence[str]], int]
Finished = tuple[Path, list[dict[str, Any]]]


def text(words: int, seed: int) -> str:
    """Lines of 3 to 12 words."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(3, 13))) for _ in range(words // 8)]
    return "\n".join(lines) + "\n"


def write_corpora(folder: Path) -> Path:
    """The three corpora in miniature, in the layout of a real data folder."""
    for seed, name in enumerate(("wikitext2/validation", "wikitext2/test", "ptb/train", "ptb/test")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text(900, seed))
    (folder / "c4").mkdir()
    for seed, split in enumerate(("train", "validation")):
        texts = [text(120, 100 * seed + number) for number in range(12)]
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "c4" / f"{split}.parquet")
    return folder


def checkpoint(folder: Path, family: str = "opt", head: str | None = None, **sizes: Any) -> str:
    build_model(family, head, **sizes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def read_records(output: Path, name: str = "mine") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "opt" / f"{name}.jsonl").read_text().splitlines()]


def read_plan(folder: str | Path) -> Plan:
    return Plan.from_json((Path(folder) / "shrinkformer_plan.json").read_text())


def kept(plan: Plan) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(layer.heads, layer.neurons) for layer in plan.layers]


def call(main: Main, data_dir: Path, *arguments: str) -> int:
    common = ["--data_dir", str(data_dir), "--sequence_length", str(LENGTH)]
    calibration = ["--sample_batch_size", "16", "--method", "stat"] if main is prune_opt.main else []  # fast
    return main([*common, *calibration, *arguments])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call a command in a folder that holds nothing but a checkpoint, ``mine``."""
    checkpoint(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, main=prune_opt.main: call(main, data_dir, "--model_name", "mine", *arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Finished:
    """A folder where one command pruned ``mine`` to several budgets, and what it reported."""
    folder = tmp_path_factory.mktemp("finished")
    name, output = checkpoint(folder / "mine"), folder / "output"
    budgets = map(str, BUDGETS)
    assert call(prune_opt.main, data_dir, "--model_name", name, "--output_dir", str(output), "--mu", *budgets) == 0
    return folder, read_records(output)


class TestReport:
    def test_keys(self, finished: Finished) -> None:
        folder, records = finished
        measured = {"metrics", "macs", "parameters", "bytes", "latency_ms"}
        for record, mu in zip(records, BUDGETS, strict=True):
            assert (record["model_name"], record["task_name"], record["mu"]) == ("mine", "wikitext2", mu)
            assert (record["schema"], record["seed"], record["sample_batch_size"]) == (1, 0, 16)
            assert record["calibration_tokens"] == 16 * LENGTH
            assert set(record["dense"]) == measured
            assert {"calibration", "selection", "evaluation", "total"} <= set(record["seconds"])
            assert record["peak_memory_bytes"] > 0
        for record, mu in zip(records[:2], BUDGETS, strict=False):
            assert set(record["pruned"]) == measured
            assert record["seconds"].keys() >= {"allocation", "refit"}
            assert set(record["ratio"]) == {"macs", "parameters", "bytes", "latency"}
            assert mu - 0.02 < record["ratio"]["macs"] <= mu
            assert [(layer["layer"], set(layer)) for layer in record["layers"]] == [
                (index, {"layer", "heads", "neurons", "attention_error", "ffn_error"}) for index in range(3)
            ]
            assert record["save_dir"] == str(folder / f"output/opt/mine-wikitext2-mu{mu:g}")
        assert not {"pruned", "ratio", "layers", "save_dir"} & set(records[2])

    def test_every_corpus_is_measured_on_both_models(self, finished: Finished) -> None:
        _, records = finished
        for figures in (records[0]["dense"], records[0]["pruned"], records[1]["pruned"], records[2]["dense"]):
            assert set(figures["metrics"]) == METRICS | {f"{name}_stderr" for name in METRICS}
            assert all(value > 0 for value in figures["metrics"].values())
            assert figures["metrics"]["perplexity"] == figures["metrics"]["perplexity_wikitext2"]
        assert records[0]["dense"]["metrics"] == records[2]["dense"]["metrics"]

    def test_figures_are_those_of_the_files(self, finished: Finished, data_dir: Path) -> None:
        folder, (record, *_) = finished
        small = shrinkformer.load(record["save_dir"])
        for figures, path, model in (
            (record["dense"], folder / "mine", AutoModelForCausalLM.from_pretrained(folder / "mine")),
            (record["pruned"], record["save_dir"], small),
        ):
            assert figures["bytes"] == folder_bytes(path)
            assert figures["parameters"] == count_parameters(model)
            for name, corpus in CORPORA.items():
                windows = evaluation_windows(corpus, build_tokenizer(), length=LENGTH, data_dir=data_dir)
                found = evaluate_perplexity(model, windows, batch_size=5)
                assert figures["metrics"][f"perplexity_{name}"] == pytest.approx(found.value, rel=1e-6)
                assert figures["metrics"][f"perplexity_{name}_stderr"] == pytest.approx(found.stderr, rel=1e-4)
        assert [layer["neurons"] for layer in record["layers"]] == read_plan(record["save_dir"]).neurons

    def test_the_text_is_for_people(self, finished: Finished) -> None:
        shown = (finished[0] / "output/opt/mine.txt").read_text()
        for word in (*METRICS, "±", "MACs", "parameters", "file size", "latency", "attention error", "mu 0.7", "mu 1"):
            assert word in shown

    def test_nothing_else_is_written(self, finished: Finished) -> None:
        names = {path.name for path in (finished[0] / "output/opt").iterdir()}
        assert names == {"mine.txt", "mine.jsonl", "mine.html", "mine-wikitext2-mu0.7", "mine-wikitext2-mu0.5"} | {
            "mine-wikitext2.resume"  # which budgets are finished
        }


class TestBudgets:
    def test_several_share_one_calibration(
        self,
        run: Callable[..., int],
        finished: Finished,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real, calls = running.calibrate, []
        monkeypatch.setattr(running, "calibrate", lambda *a, **options: (calls.append(1), real(*a, **options))[1])
        assert run("--mu", "0.8", "0.5") == 0
        assert len(calls) == 1
        together, alone = finished[1][1], read_records(Path("output"))[1]
        assert together["layers"] == alone["layers"]
        assert together["pruned"]["metrics"] == alone["pruned"]["metrics"]

    def test_one_budget_into_a_folder_of_choice(self, run: Callable[..., int]) -> None:
        assert run("--mu", "0.6", "--save_dir", "kept/here") == 0
        assert read_records(Path("output"))[0]["save_dir"] == "kept/here"
        assert read_plan("kept/here").ratio <= 0.6

    def test_mu_1_evaluates_only(self, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(running, "calibrate")
        assert run("--mu", "1") == 0
        (record,) = read_records(Path("output"))
        assert set(record["dense"]["metrics"]) >= METRICS
        assert "pruned" not in record
        assert {path.name for path in Path("output/opt").iterdir()} == {"mine.txt", "mine.jsonl", "mine.html"}


class TestCheckpoint:
    def test_it_loads_with_and_without_this_package(self, finished: Finished) -> None:
        folder = finished[1][1]["save_dir"]
        ours = shrinkformer.load(folder).eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        ids = torch.arange(5, 29).reshape(2, 12)
        with torch.no_grad():
            assert ours(ids).logits.equal(theirs(ids).logits)
            assert ours(ids).logits.isfinite().all()

    def test_generation_with_a_cache_gives_the_same_tokens(self, finished: Finished) -> None:
        model = shrinkformer.load(finished[1][1]["save_dir"]).eval()
        answers = []
        for use_cache in (True, False):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                options = {"do_sample": True, "min_new_tokens": 20, "max_new_tokens": 20, "use_cache": use_cache}
                answers.append(model.generate(torch.arange(5, 11)[None], **options))
        assert answers[0].shape == (1, 26)
        assert answers[0].equal(answers[1])
        assert len(set(answers[0][0, 6:].tolist())) > 5

    def test_the_tokenizer_travels_along(self, finished: Finished) -> None:
        from transformers import AutoTokenizer

        there = AutoTokenizer.from_pretrained(finished[1][0]["save_dir"])
        assert there(text(40, 3))["input_ids"] == build_tokenizer()(text(40, 3))["input_ids"]


class TestSeeds:
    def test_the_same_command_gives_the_same_plan_and_another_seed_another(self, run: Callable[..., int]) -> None:
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
            assert run("--mu", "0.5", "--seed", seed, "--save_dir", name) == 0
        first, again, other = (read_plan(name) for name in "abc")
        assert first == again
        assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
        assert other.seed == 1
        assert [layer.ffn_error for layer in other.layers] != [layer.ffn_error for layer in first.layers]

    def test_global_generators_are_left_alone(self, run: Callable[..., int]) -> None:
        states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
        assert run("--mu", "0.5") == 0
        assert random.getstate() == states[0]
        assert torch.get_rng_state().equal(states[1])
        assert np.array_equal(np.random.get_state()[1], states[2])


class TestDryRun:
    @pytest.mark.parametrize("main", [prune_opt.main, opt_eval.main])
    def test_it_reads_no_weights_and_writes_nothing(
        self, run: Callable[..., int], main: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(running, "load_model")
        before = set(Path().iterdir())
        assert run("--dry_run", main=main) == 0
        shown = capsys.readouterr().out
        mu = "mu 0.7" if main is prune_opt.main else "mu 1"
        for word in ("3 blocks", "12 heads of 8", "192 neurons", "M parameters", mu, "MACs", "MB", "memory", "time"):
            assert word in shown
        assert set(Path().iterdir()) == before

    def test_it_says_when_the_model_does_not_fit(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--dry_run", "--max_memory", "0.00001") == 0
        assert "block by block" in capsys.readouterr().out


class TestOptEval:
    def test_it_measures_what_prune_opt_reports(self, run: Callable[..., int], finished: Finished) -> None:
        assert run(main=opt_eval.main) == 0
        (record,) = read_records(Path("output"))
        assert record["dense"]["metrics"] == finished[1][2]["dense"]["metrics"]
        assert (record["mu"], "pruned" in record) == (1, False)

    def test_trackers_get_its_figures(self, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[Run, Path]] = []
        monkeypatch.setattr(tracking, "_WRITERS", {"tensorboard": lambda *arguments: seen.append(arguments)})
        monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name)
        assert run("--report_to", "tensorboard", main=opt_eval.main) == 0
        (record,), ((found, folder),) = read_records(Path("output")), seen
        assert {f"dense/{name}" for name in record["dense"]["metrics"]} <= tracking.scalars(found).keys()
        assert folder.parent == Path("output/opt/runs")

    def test_a_pruned_folder(self, run: Callable[..., int], finished: Finished) -> None:
        pruned = finished[1][1]
        assert run("--model_name", pruned["save_dir"], main=opt_eval.main) == 0
        (record,) = read_records(Path("output"), "mine-wikitext2-mu0.5")
        assert record["dense"]["metrics"] == pytest.approx(pruned["pruned"]["metrics"], rel=1e-6)
        assert [record["dense"][name] for name in ("macs", "parameters", "bytes")] == [
            pruned["pruned"][name] for name in ("macs", "parameters", "bytes")
        ]

    def test_flags_of_pruning_are_unknown(self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--mu", "0.5", main=opt_eval.main) == 2
        assert re.fullmatch(r"opt_eval.py: error: .*--mu.*\n", capsys.readouterr().err)


class TestOwnTexts:
    def test_both(self, run: Callable[..., int]) -> None:
        Path("poems.txt").write_text(text(600, 8))
        Path("letters.txt").write_text(text(300, 9))
        assert run("--mu", "0.5", "--calibration_file", "poems.txt", "--evaluation_file", "letters.txt") == 0
        (record,) = read_records(Path("output"))
        metrics = record["pruned"]["metrics"]
        assert record["task_name"] == "poems.txt"
        assert set(metrics) >= METRICS | {"perplexity_letters.txt", "perplexity_letters.txt_stderr"}
        assert metrics["perplexity"] == metrics["perplexity_letters.txt"]
        assert read_plan(record["save_dir"]).ratio <= 0.5

    def test_one_to_judge_only(self, run: Callable[..., int]) -> None:
        Path("letters.txt").write_text(text(300, 9))
        assert run("--evaluation_file", "letters.txt", main=opt_eval.main) == 0
        (record,) = read_records(Path("output"))
        metrics = record["dense"]["metrics"]
        assert metrics["perplexity_letters.txt"] != metrics["perplexity"] == metrics["perplexity_wikitext2"]


def test_another_corpus(run: Callable[..., int]) -> None:
    assert run("--task", "c4-new", "--mu", "0.5") == 0
    (record,) = read_records(Path("output"))
    assert record["task_name"] == "c4-new"
    assert record["pruned"]["metrics"]["perplexity"] == record["pruned"]["metrics"]["perplexity_c4-new"]


class TestStat:
    """The command line of STAT's own repository."""

    LINE = ("--model_name", "opt-125M", "--task", "wikitext2", "--mu", "0.7", "--seed", "0")

    def test_it_works_where_the_model_is(self, run: Callable[..., int]) -> None:
        Path("mine").rename("opt-125M")
        Path("models").mkdir()
        Path("opt-125M").rename("models/opt-125M")
        assert run(*self.LINE) == 0
        (record,) = read_records(Path("output"), "opt-125M")
        assert record["ratio"]["macs"] <= 0.7

    def test_its_name_is_one_of_the_hub(self, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def offline(name: str, *_: Any) -> None:
            asked.append(name)
            raise OSError("no network")

        monkeypatch.setattr("shrinkformer.prune.opening.cached_file", offline)
        assert run(*self.LINE) == 2
        assert asked == ["facebook/opt-125m"]

    def test_without_a_hub_it_is_one_line(self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        assert run(*self.LINE) == 2
        line = capsys.readouterr().err
        assert re.fullmatch(
            r"prune_opt.py: error: --model_name opt-125M: not in models/opt-125M/wikitext2.*hub.*\n", line
        ), line


BAD_INPUT = {
    "unknown task": (["--task", "wikitext3"], r"--task 'wikitext3': .*wikitext2, ptb-new, c4-new"),
    "windows too long": (["--sequence_length", "65"], r"--sequence_length 65: mine takes at most 64 tokens"),
    "windows too short": (["--sequence_length", "1"], r"--sequence_length 1: must be at least 2"),
    "encoder": (["--model_name", "bert"], r"--model_name bert: it is a BertForSeq.*for an encoder leave --task out"),
    "no language model": (["--model_name", "headless"], r"--model_name headless: it is a OPTModel"),
    "no model": (["--model_name", "nobody/nothing"], r"--model_name nobody/nothing: not in models/nobody/nothing"),
    "no tokenizer": (["--model_name", "mute"], r"--model_name mute: mute holds no tokenizer"),
    "not a checkpoint": (["--model_name", "empty"], r"--model_name empty: .*no config\.json"),
    "mu of zero": (["--mu", "0"], r"--mu 0.0: must be in \(0, 1\]"),
    "seed": (["--seed", "-1"], r"--seed -1"),
    "type": (["--dtype", "int4"], r"--dtype 'int4': choose one of auto"),
    "memory": (["--max_memory", "0"], r"--max_memory 0.0: must be positive"),
    "no data folder": (["--data_dir", "nowhere"], r"--data_dir nowhere: no such folder"),
    "no data in it": (["--data_dir", "empty"], r"--data_dir empty .*wikitext2/test.*--bundled_data"),
    "no calibration text": (["--calibration_file", "x.txt"], r"--calibration_file x.txt: no such file"),
    "no evaluation text": (["--evaluation_file", "x.txt"], r"--evaluation_file x.txt: no such file"),
    "short evaluation text": (["--evaluation_file", "a.txt"], r"a.txt has 4 tokens, less than one window of 24"),
    "the same file": (["--calibration_file", "a.txt", "--evaluation_file", "a.txt"], r"--calibration_file.*same text"),
    "the same text": (["--calibration_file", "a.txt", "--evaluation_file", "b.txt"], r"--calibration_file.*same text"),
    "save over something else": (["--save_dir", "mine"], r"--save_dir mine: it holds something else"),
    "offload to a file": (["--offload_dir", "a.txt"], r"--offload_dir a.txt: .*is a file"),
    "task of prune_bert": (["--task_name", "sst2"], r"--task_name"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Callable[..., int],
    tmp_path: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, message = BAD_INPUT[case]
    checkpoint(tmp_path / "bert", "bert")
    checkpoint(tmp_path / "headless", head="Model")
    build_model("opt").save_pretrained(tmp_path / "mute")
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the cat")
    before = set(tmp_path.rglob("*"))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(running, "load_model", never)
    capsys.readouterr()  # progress bars of the files made above
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("prune_opt.py: error: ")
    assert re.search(message, line), line
    assert set(tmp_path.rglob("*")) == before


class TestLaterFailures:
    """Exit code 1, one line, no traceback."""

    @pytest.mark.parametrize("memory", [[], ["--max_memory", "0.00001"]], ids=["in memory", "block by block"])
    def test_damaged_weights(self, run: Callable[..., int], memory: list[str], capsys: Any) -> None:
        Path("mine/model.safetensors").write_bytes(b"nonsense")
        capsys.readouterr()
        assert run("--mu", "0.5", *memory) == 2
        assert re.fullmatch(
            r"prune_opt.py: error: .*mine: model.safetensors cannot be read .*\n", capsys.readouterr().err
        )

    @pytest.mark.parametrize("memory", [[], ["--max_memory", "0.00001"]], ids=["in memory", "block by block"])
    def test_a_tokenizer_with_more_tokens_than_the_model(
        self, run: Callable[..., int], memory: list[str], capsys: Any
    ) -> None:
        checkpoint(Path("few"), vocab_size=30)
        capsys.readouterr()
        assert run("--model_name", "few", "--mu", "0.5", *memory) == 2
        assert re.fullmatch(r"prune_opt.py: error: .* has room for 30; put the .*\n", capsys.readouterr().err)

    def test_an_impossible_budget_fails_before_any_work(self, run: Callable[..., int], capsys: Any) -> None:
        assert run("--mu", "0.5", "0.01") == 2
        assert "--mu 0.01 cannot be met" in capsys.readouterr().err
        assert not Path("output").exists()
