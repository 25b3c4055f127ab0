"""One command for everything: which script does the work, and what bad input says."""

import sys
from pathlib import Path

import pytest

from shrinkformer.commands import main as console
from shrinkformer.commands.main import COMMANDS, kind_of_model, main
from shrinkformer.errors import InputError
from tests.conftest import build_model


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ([], "encoder"),
        (["--task_name", "qqp", "--model_name", "nowhere"], "encoder"),
        (["--task", "wikitext2"], "decoder"),
        (["--task=c4-new", "--model_name", "nowhere"], "decoder"),
        (["--model_name", "opt-mini"], "decoder"),
        (["--model_name", "opt-125M", "--mu", "0.5"], "decoder"),
        (["--model_name", "all-MiniLM-L6-v2"], "encoder"),
        (["--model_name"], "encoder"),
    ],
)
def test_kind_by_flags(flags: list[str], kind: str) -> None:
    assert kind_of_model(flags) == kind


def test_kind_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_model().config.save_pretrained("models/mine/qqp")
    assert kind_of_model(["--model_name", "mine"]) == "encoder"
    with pytest.raises(InputError, match="--model_name theirs: not in models/theirs"):
        kind_of_model(["--model_name", "theirs"])


@pytest.mark.parametrize(
    ("given", "module", "passed"),
    [
        (["prune", "--task_name", "qqp", "--mu", "0.3"], "prune_bert", ["--task_name", "qqp", "--mu", "0.3"]),
        (["prune", "--task", "wikitext2"], "prune_opt", ["--task", "wikitext2"]),
        (["quantize", "--task_name", "qqp"], "quantize_bert", ["--task_name", "qqp"]),
        (["quantize", "--task", "ptb-new"], "quantize_opt", ["--task", "ptb-new"]),
        (["evaluate", "--task_name", "qqp"], "prune_bert", ["--task_name", "qqp", "--mu", "1"]),
        (["evaluate", "--model_name", "opt-mini"], "opt_eval", ["--model_name", "opt-mini"]),
    ],
)
def test_scripts_do_the_work(given: list[str], module: str, passed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, list[str]]] = []

    class Script:
        def __init__(self, name: str) -> None:
            self.name = name

        def main(self, arguments: list[str]) -> int:
            called.append((self.name, arguments))
            return 7

    monkeypatch.setattr(console.importlib, "import_module", Script)
    assert main(given) == 7
    assert called == [(f"shrinkformer.commands.{module}", passed)]


def test_help_and_what_is_no_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and text in shown for name, text in COMMANDS.items())
    monkeypatch.setattr(sys, "argv", ["shrinkformer", "shrink"])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'shrink' is no command; choose one of prune," in error


def test_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--model_name", "nowhere/at-all"]) == 2
    assert "--model_name nowhere/at-all" in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert "usage" in capsys.readouterr().out
