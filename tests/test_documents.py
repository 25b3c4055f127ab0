"""Every command and every example of README and docs runs, as it stands, on tiny models and data of the same names."""

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from transformers import AutoModelForSequenceClassification

import shrinkformer
from shrinkformer.commands import main as console
from shrinkformer.commands import prune_bert, prune_opt
from shrinkformer.errors import ShrinkformerError
from tests.conftest import ROOT, build_model, load_script
from tests.world import build, code_blocks, commands, hub

OWN_TEST = {"hub"}  # needs a hub: tests/test_hub_page.py

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [path for path in DOCUMENTS if path.stem not in OWN_TEST]

SETUP = {"git", "pip", "make", "benchmarks/peers/install.sh"}
"""What sets a machine up; targets and extras are looked up instead."""

TOO_LARGE = {
    "benchmarks.large_models": "makes checkpoints of more than a billion weights",
    "benchmarks.quantization": "runs other projects in environments of their own",
    "benchmarks.kills": "disturbs runs for many minutes; tests/test_disturbed.py does it briefly",
    "benchmarks.failing_writes": "the same",
    "benchmarks.malformed": "takes minutes; tests/test_malformed.py runs it",
    "benchmarks.fuzz": "takes an hour; tests/test_fuzz.py draws some examples",
    "benchmarks.threads": "prunes a real model several times; tests/test_threads.py does it with a tiny one",
    "benchmarks.predictions": "prunes real models",
    "benchmarks.busy": "takes all cores, on purpose",
    "benchmarks.calibration_memory": "makes a large model",
    "benchmarks.fresh_environment": "makes virtual environments",
}
"""Of these benchmarks only the flags are checked."""

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def _all() -> list[Any]:
    seen: dict[str, Any] = {}
    for path in DOCUMENTS:
        for words in commands(path):
            if words[0] not in SETUP:
                marks = [pytest.mark.slow] if path.stem == "benchmarks" or _takes_long(words) else []
                name = " ".join(words)
                same = re.sub(r"^shrinkformer prune (?=.*--task_name)", "python prune_bert.py ", name)
                same = same.replace("--model_name ", "")
                seen.setdefault(same, pytest.param(words, id=f"{path.stem}: {name[:90]}", marks=marks))
    return list(seen.values())


LONG = {
    "torchrun",
    "prerequisites/prepare_checkpoints.py",
    "-m",
    "compile",
    "squad",
    "--target_ratio",
    "--markdown",
    "--batch",
}
"""Benchmarks, training, compilers and the like take minutes even here, and processes import torch once each."""


def _takes_long(words: list[str]) -> bool:
    return bool(LONG & set(words))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = build(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)  # what some commands take up
        quick = ["--method", "stat", "--bundled_data"]
        assert prune_bert.main([*quick, "--task_name", "similarity", "--mu", "0.5", "0.3"]) == 0
        assert prune_opt.main([*quick, "--mu", "0.7", "--evaluation_windows", "4"]) == 0
    return work


@pytest.fixture
def work(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    monkeypatch.setattr(datasets, "load_dataset", hub(world / "data"))
    return world


@pytest.mark.timeout(900)
@pytest.mark.parametrize("words", _all())
def test_command(words: list[str], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(words, work)
    assert run(words, monkeypatch) == 0


def prepare(words: list[str], work: Path) -> None:
    """What a command takes for granted: the checkpoint of its task."""
    task = words[words.index("--task_name") + 1] if "--task_name" in words else "qqp"
    link = work / "path" / "to" / "checkpoint"
    link.unlink(missing_ok=True)
    link.symlink_to(task)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process where that is possible."""
    if words[0] == "shrinkformer":
        return console.main(words[1:])
    if words[0] == "torchrun":
        line = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        environment = os.environ | {"PYTHONPATH": f"{_hub_of_others()}:{ROOT}", "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, env=environment, check=False).returncode
    assert words[0] == "python", f"no way is known to run {words}"
    if words[2] in TOO_LARGE:
        return _knows_flags(words, monkeypatch)
    if words[1] == "-m":
        module, rest = importlib.import_module(words[2]), words[3:]
    else:
        script = Path(words[1]).stem
        module = (
            load_script(words[1]) if "/" in words[1] else importlib.import_module(f"shrinkformer.commands.{script}")
        )
        rest = words[2:]
    monkeypatch.setattr(sys, "argv", [words[1], *rest])
    return int(module.main() or 0)


def _hub_of_others() -> Path:
    """A folder that puts the data of this test in the hub's place in processes that have it on their path."""
    folder = Path("hub_of_others")
    folder.mkdir(exist_ok=True)
    lines = (
        "import datasets",
        "from pathlib import Path",
        "from tests.world import hub",
        f"datasets.load_dataset = hub(Path({str(Path('data').resolve())!r}))",
    )
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return folder.resolve()


def _knows_flags(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """0 if ``--help`` of a benchmark names every flag of the command."""
    monkeypatch.setattr(sys, "argv", [words[2], "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        importlib.import_module(words[2]).main()
    return len({word for word in words[3:] if word.startswith("--")} - set(re.findall(r"--\w+", shown.getvalue())))


def test_setup_commands_name_what_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCUMENTS:
        for words in commands(path):
            if words[0] == "make":
                assert set(words[1:]) <= targets, words
        for extra in re.findall(r"\.\[([\w-]+)\]\"", path.read_text()):
            assert extra in EXTRAS, (path, extra)


def test_tables_of_flags_are_those_of_the_options() -> None:
    flags = load_script("docs/flags.py")
    assert flags.page(flags.PAGE.read_text()) == flags.PAGE.read_text(), "run python docs/flags.py"


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs-material")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | QUIET)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").is_file()


QUIET = {"NO_MKDOCS_2_WARNING": "1"}


class TestExamples:
    """Python blocks of a page are one program."""

    @pytest.fixture
    def names(self, work: Path, batches: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """What the pages take for granted."""
        classifier = build_model()
        tokenizer = transformers.AutoTokenizer.from_pretrained("models/bert-base-uncased/qqp")
        texts = ["the cat sees a dog", "a bird sings", "the old man never sleeps", "red fish or blue fish"] * 16
        rows = [{**tokenizer(text), "labels": index % 2} for index, text in enumerate(texts)]
        yield {
            "shrinkformer": shrinkformer,
            "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
            "pipeline": transformers.pipeline,
            "source": "models/all-MiniLM-L6-v2/similarity",
            "texts": texts,
            "model": classifier,
            "classifier": build_model(),
            "tokenizer": tokenizer,
            "batches": batches,
            "train_dataset": rows,
        }
        for folder in (
            "smaller",
            "smaller-again",
            "smaller-int4",
            "trained-and-smaller",
            "adapted",
            "adapter",
            "run",
            "folder",
        ):
            shutil.rmtree(work / folder, ignore_errors=True)

    @pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
    def test_page(self, page: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        pushed: list[str] = []  # tests/test_hub.py sends for real
        monkeypatch.setattr(shrinkformer, "push_to_hub", lambda folder, name, **_: pushed.append(folder), raising=False)
        blocks = code_blocks(ROOT / page, "python")
        assert blocks
        for block in blocks:
            exec(compile(block, page, "exec"), names)
        assert (Path("smaller") / "model.safetensors").is_file()
        assert set(pushed) <= {"smaller"}

    def test_loading_a_checkpoint(self, names: dict[str, Any], batches: list[dict[str, Any]]) -> None:
        pruned = shrinkformer.prune_model(names["model"], batches, mu=0.5, method="stat")
        shrinkformer.save(pruned.model, "folder", plan=pruned.plan)
        (block,) = code_blocks(ROOT / "docs" / "checkpoint.md", "python")[:1]
        exec(compile(block, "checkpoint.md", "exec"), names)
        assert sum(p.numel() for p in names["model"].parameters()) == sum(p.numel() for p in pruned.model.parameters())

    def test_quick_start(self, work: Path, names: dict[str, Any], batches: list[dict[str, Any]]) -> None:
        folder = Path("output/all-MiniLM-L6-v2/similarity-mu0.5")
        shutil.rmtree(folder, ignore_errors=True)
        pruned = shrinkformer.prune_model(build_model("bert", "Model"), batches, mu=0.5, method="stat")
        shrinkformer.save(pruned.model, folder, plan=pruned.plan)
        for block in code_blocks(ROOT / "docs" / "quickstart.md", "python"):
            exec(compile(block, "quickstart.md", "exec"), names)
            assert names["model"].num_parameters() == pruned.model.num_parameters()


def test_errors_of_the_page_exist() -> None:
    from shrinkformer import errors

    named = set(re.findall(r"`(\w+Error)`", (ROOT / "docs" / "python.md").read_text()))
    assert named
    assert all(issubclass(getattr(errors, name), ShrinkformerError) for name in named)
