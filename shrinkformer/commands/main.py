"""``shrinkformer``: all commands under one name; each is imported when it is asked for."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from shrinkformer.errors import ShrinkformerError
from shrinkformer.trust.foreign import printable

COMMANDS = {
    "prune": "make a model smaller under a MAC budget, evaluate and save it",
    "quantize": "the same, and store its weights as integers of 8 to 1 bits",
    "evaluate": "metrics and sizes of a model as it is",
    "export": "write a model as an ONNX file, checked in ONNX Runtime",
    "latency": "time models side by side, in one or several runtimes",
    "push": "send a finished checkpoint to the Hugging Face hub",
    "inspect": "sizes, MACs and bytes of a checkpoint, layer by layer, without loading its weights",
}
"""What each command does; ``shrinkformer <command> --help`` lists its flags."""

_MODULES = {
    ("prune", "encoder"): "prune_bert",
    ("prune", "decoder"): "prune_opt",
    ("quantize", "encoder"): "quantize_bert",
    ("quantize", "decoder"): "quantize_opt",
    ("evaluate", "encoder"): "prune_bert",
    ("evaluate", "decoder"): "opt_eval",
}
"""The scripts do the work: one for encoders and one for language models."""

_OWN = frozenset(COMMANDS) - {command for command, _ in _MODULES}  # a module of the same name, for all models

_WRONG_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``shrinkformer`` and of ``python -m shrinkformer``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (given[0], given[1:]) if given else ("--help", [])
    if command in {"-h", "--help"}:
        print(usage())
        return 0
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"shrinkformer: error: {command!r} is no command; choose one of {known}.", file=sys.stderr)
        return _WRONG_INPUT
    try:
        module = command if command in _OWN else _MODULES[command, kind_of_model(rest)]
    except ShrinkformerError as error:
        print(f"shrinkformer: error: {printable(str(error))}", file=sys.stderr)
        return _WRONG_INPUT
    extra = ["--mu", "1"] if (command, module) == ("evaluate", "prune_bert") else []
    code: int = importlib.import_module(f"shrinkformer.commands.{module}").main([*rest, *extra])
    return code


def usage() -> str:
    """What ``--help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: shrinkformer COMMAND [flags]", "", *lines, "", "shrinkformer COMMAND --help lists the flags of one."]
    )


def kind_of_model(arguments: Sequence[str]) -> str:
    """Whether flags mean an encoder or a decoder: by the task where one is named, else by the model's configuration.

    Raises:
        InputError: The model is nowhere.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--task_name", "--task", "--model_name"):
        parser.add_argument(flag, default=None)
    try:
        flags, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # a flag without its value; the command says which
        return "encoder"
    if flags.task is not None or flags.task_name is not None or flags.model_name is None:
        return "encoder" if flags.task is None else "decoder"
    from shrinkformer.commands.locate import is_decoder  # takes the seconds that torch and transformers take

    return "decoder" if is_decoder(flags.model_name) else "encoder"
