"""One rule for where commands find data, for encoders and language models, pruning, quantizing and evaluating."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from shrinkformer.commands.main import main
from shrinkformer.commands.options import DecoderOptions, EncoderOptions, PruneOptions
from shrinkformer.commands.samples import read_or_sample
from shrinkformer.errors import MissingDataError, ShrinkformerWarning
from tests.conftest import build_model, build_tokenizer


def offline(*arguments: Any, **options: Any) -> Any:
    raise ConnectionError("no network here")


@pytest.mark.parametrize("kind", [EncoderOptions, DecoderOptions])
class TestRule:
    @pytest.mark.parametrize(("asked", "demo"), [(True, False), (False, True), (True, True)])
    def test_samples_are_taken_for_demo_models_and_where_asked_for(
        self, kind: type[PruneOptions], asked: bool, demo: bool
    ) -> None:
        found, bundled = read_or_sample(kind(bundled_data=asked), lambda options: options.bundled_data, demo=demo)
        assert found
        assert bundled

    @pytest.mark.parametrize("demo", [False, True])
    def test_a_folder_comes_first(self, kind: type[PruneOptions], demo: bool, tmp_path: Path) -> None:
        options = kind(data_dir=tmp_path)
        assert read_or_sample(options, lambda options: options.bundled_data, demo=demo) == (False, False)

        def missing(options: PruneOptions) -> None:
            raise MissingDataError("--data_dir has none")

        with pytest.raises(MissingDataError, match="--data_dir has none"):
            read_or_sample(options, missing, demo=demo)

    def test_then_the_hub_then_samples_with_a_warning(self, kind: type[PruneOptions]) -> None:
        def read(options: PruneOptions) -> str:
            if not options.bundled_data:
                raise MissingDataError("the hub cannot be reached; connect to the network")
            return "sample"

        with pytest.warns(ShrinkformerWarning, match="the hub cannot be reached; .* figures are those of an excerpt"):
            assert read_or_sample(kind(), read, demo=False) == ("sample", True)
        assert read_or_sample(kind(), lambda options: "whole", demo=False) == ("whole", False)


@pytest.mark.parametrize(
    ("family", "task", "figure"), [("bert", "stsb", "pearson"), ("opt", "ptb-new", "perplexity_c4-new")]
)
def test_any_model_is_measured_without_a_network(
    family: str, task: str, figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What README does after pruning, with a folder that has no name of ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    model = build_model(family, **({"num_labels": 1} if family == "bert" else {}))
    model.save_pretrained("mine")
    build_tokenizer().save_pretrained("mine")
    assert main(["evaluate", "mine", "--task", task, "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("warning: --data_dir is not given and the hub's") == 1
    assert "figures are those of an excerpt" in shown.err
    (report,) = tmp_path.rglob("*.jsonl")
    assert json.loads(report.read_text())["dense"]["metrics"][figure] is not None


def test_tasks_without_samples_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    build_model(num_labels=2).save_pretrained("mine")
    build_tokenizer().save_pretrained("mine")
    assert main(["prune", "mine", "--task", "qqp", "--mu", "0.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--data_dir is not given and the hub's" in error
