"""One command for everything: what each verb takes, which kind of model flags mean, and what bad input says."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shrinkformer
from shrinkformer.commands import verbs
from shrinkformer.commands.flags import DECODER, ENCODER, flags_of
from shrinkformer.commands.main import main
from shrinkformer.commands.verbs import COMMANDS, SCRIPTS, kind_of_model, run_script
from shrinkformer.errors import InputError
from tests.conftest import ROOT, build_model

KINDS = [name for name, command in COMMANDS.items() if len(command.classes) > 1]
"""Commands for encoders and language models."""


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, ENCODER),
        ({"task_name": "qqp", "model_name": "nowhere"}, ENCODER),
        ({"task_name": "c4-new", "model_name": "nowhere"}, DECODER),
        ({"model_name": "opt-mini"}, DECODER),
        ({"model_name": "opt-125M"}, DECODER),
        ({"model_name": "all-MiniLM-L6-v2"}, ENCODER),
    ],
)
def test_kind_by_flags(given: dict[str, str], kind: str) -> None:
    assert kind_of_model(given) == kind


def test_kind_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_model().config.save_pretrained("models/mine/qqp")
    assert kind_of_model({"model_name": "mine"}) == ENCODER
    with pytest.raises(InputError, match="--model_name theirs: not in models/theirs"):
        kind_of_model({"model_name": "theirs"})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Options that commands would have run with."""
    found: list[Any] = []

    monkeypatch.setattr(verbs, "work_of", lambda command: found.append)
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("spelling", ["--task_name", "--task"])
def test_one_command_for_every_kind(name: str, spelling: str, asked: list[Any]) -> None:
    assert main([name, spelling, "qqp", "--model_name", "nowhere"]) == 0
    assert main([name, "nowhere", f"{spelling}=c4-new", "--evaluation_windows", "3"]) == 0
    assert [type(options) for options in asked] == list(COMMANDS[name].classes.values())
    assert [(options.model_name, options.task_name) for options in asked] == [("nowhere", "qqp"), ("nowhere", "c4-new")]
    assert {options.batch_size for options in asked} == {32, 8}, "defaults are those of the kind"
    assert name != "evaluate" or {options.mu for options in asked} == {(1.0,)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_old_names_are_the_same_commands(script: str, asked: list[Any]) -> None:
    name, kind = SCRIPTS[script]
    task = {ENCODER: "--task_name=qqp", DECODER: "--task=ptb-new"}[kind]
    assert run_script(script, [task, "--model_name", "nowhere"]) == 0
    assert main([name, task, "--model_name", "nowhere"]) == 0
    assert asked[0] == asked[1]
    assert type(asked[0]) is COMMANDS[name].classes[kind]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["prune", "--task_name", "qqp", "--lm_eval", "arc"], "--lm_eval: it is for language models, and the model is"),
        (["evaluate", "--dtype", "float32"], "--dtype: it is for language models"),
        (["prune", "--serch_seconds", "3"], "--serch_seconds: there is no such flag; did you mean --search_seconds?"),
        (["prune", "--whole-heads"], "--whole-heads: there is no such flag; did you mean --whole_heads?"),
        (["prune", "--colour", "red"], "--colour: there is no such flag; shrinkformer prune --help-all lists"),
        (["prune", "one", "two"], "'two': it belongs to no flag"),
        (["prune", "one", "--model_name", "two"], "one and --model_name two both name the model"),
        (["prune", "--mu", "half"], "--mu 'half': give a number"),
        (
            ["prune", "--mu", "0.5", "folder"],
            "--mu 'folder': give a number; a model that has no flag goes before",
        ),
        (["prune", "--mu"], "--mu: expected at least one argument"),
        (["prune", "--mu", "0.5", "7"], "--mu 7.0: must be in (0, 1]"),
        (["prune", "--seed", "0.5"], "--seed '0.5': give a whole number."),
        (["prune", "--task", "wikitext2", "--sequence_length", "6.5"], "--sequence_length '6.5': give a whole number."),
        (["prune", "--round_to", "some"], "--round_to 'some': give a whole number, or auto."),
        (["prune", "--task", "wiki"], "--task 'wiki': choose one; for encoders mnli,"),
        (["prune", "--task_name=wiki"], "--task_name 'wiki': choose one; for encoders mnli,"),
        (["prune", "--method", "best"], "--method 'best': choose one of shrink,"),
        (["quantize", "--bits", "5"], "--bits 5: choose one of 1, 2, 3, 4, 8."),
        (["quantize", "--format", "gguf", "--mu", "1"], "--format 'gguf': choose among compressed-tensors"),
        (["latency"], "the following arguments are required: MODEL"),
        (["latency", "one", "--runtime", "tvm"], "--runtime 'tvm': choose among eager"),
        (["push", "folder"], "the following arguments are required: REPO_ID"),
        (["inspect", "one", "--sequence_length", "-1"], "--sequence_length -1.0: must be above 0."),
        (["prun"], "'prun' is no command; did you mean prune?"),
        (["shrink"], "'shrink' is no command; choose one of prune,"),
    ],
)
def test_wrong_flags_are_one_line(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_nobody_reads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``| head``: other programs end without a word then."""

    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(verbs, "help_text", closed)
    assert main(["prune", "--help"]) == 141
    assert capsys.readouterr().err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"shrinkformer {shrinkformer.__version__}\n"


def test_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--model_name", "nowhere/at-all"]) == 2
    assert "--model_name nowhere/at-all" in capsys.readouterr().err


class TestHelp:
    def shown(self, capsys: pytest.CaptureFixture[str], *given: str) -> str:
        assert main(given) == 0
        return capsys.readouterr().out

    def test_of_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = self.shown(capsys, "--help")
        assert text == self.shown(capsys)
        assert all(name in text and command.summary in text for name, command in COMMANDS.items())

    @pytest.mark.parametrize("name", COMMANDS)
    @pytest.mark.parametrize("columns", [80, 200])
    def test_fits_a_screen_and_names_every_flag(
        self, name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        short, everything = self.shown(capsys, name, "--help"), self.shown(capsys, name, "--help-all")
        assert short.count("\n") <= 40
        assert max(map(len, (short + everything).splitlines())) <= min(columns, 120)
        for flag in flags_of(COMMANDS[name].classes, COMMANDS[name].only).values():
            written = flag.about("metavar") or flag.name.upper() if flag.about("positional") is True else flag.names[0]
            assert written in short, "advanced flags are named"
            assert flag.about("help").split()[0] in everything
            assert all(str(choice) in everything for choice in flag.about("choices"))

    def test_nothing_heavy_is_imported(self) -> None:
        """One process for help of every command, and for flags that are wrong in several ways."""
        program = """
import sys
from shrinkformer.commands.main import main, prune_opt, quantize_bert
from shrinkformer.commands.verbs import COMMANDS
wrong = ("--mu 7", "--serch 1", "--method x", "--task x", "--bits 5", "--data_dir nowhere", "--mu x", "--seed -1")
codes = [main([name, how]) for name in COMMANDS for how in ("--help", "--help-all")]
codes += [prune_opt(["-h"]), quantize_bert(["-h"]), *(main(["quantize", *flags.split()]) - 2 for flags in wrong)]
heavy = {"torch", "transformers", "datasets", "evaluate", "numpy", "scipy", "sklearn", "huggingface_hub"}
sys.exit(f"{codes} {heavy & set(sys.modules)}" if any(codes) or heavy & set(sys.modules) else 0)
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "usage: shrinkformer push DIR REPO_ID [flags]" in done.stdout
