"""The commands as data: what each takes, and what does the work, which is imported once the flags are right."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from shrinkformer.commands.checkpoint_options import ExportOptions, InspectOptions, PushOptions
from shrinkformer.commands.console import quiet_libraries, run_command
from shrinkformer.commands.flags import DECODER, ENCODER, as_written, build_options, flags_of, parse_flags
from shrinkformer.commands.help import help_text
from shrinkformer.commands.latency_options import LatencyOptions
from shrinkformer.commands.options import (
    BUNDLED_DECODER,
    BUNDLED_MODEL,
    DecoderEvaluateOptions,
    DecoderOptions,
    EncoderOptions,
    EvaluateOptions,
)
from shrinkformer.commands.quantize_options import DecoderQuantizeOptions, EncoderQuantizeOptions
from shrinkformer.utils.threads import threads_of, wait_passively

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ANY = "any"
"""The kind of model of commands that treat all alike."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        summary: What it does.
        classes: Its options by kind of model.
        work: Module and function that does it, given the options.
        only: The fields that are flags; all by default.
        fixed: Values of other fields.
        spins: Threads wait for each other as they do by default, because times are what is asked for.
    """

    summary: str
    classes: "Mapping[str, type[DataclassInstance]]"
    work: str
    only: frozenset[str] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    spins: bool = False


COMMANDS: Mapping[str, Command] = {
    "prune": Command(
        "make a model smaller under a MAC budget, evaluate and save it",
        {ENCODER: EncoderOptions, DECODER: DecoderOptions},
        "work:prune",
    ),
    "quantize": Command(
        "the same, and store its weights as integers of 8 to 1 bits",
        {ENCODER: EncoderQuantizeOptions, DECODER: DecoderQuantizeOptions},
        "work:quantize",
    ),
    "evaluate": Command(
        "metrics and sizes of a model as it is",
        {ENCODER: EncoderOptions, DECODER: DecoderOptions},
        "work:prune",
        only=frozenset(entry.name for one in (EvaluateOptions, DecoderEvaluateOptions) for entry in fields(one)),
        fixed={"mu": (1.0,)},
    ),
    "export": Command(
        "write a model as an ONNX file, checked in ONNX Runtime", {ANY: ExportOptions}, "export:export_model"
    ),
    "latency": Command(
        "time models side by side, in one or several runtimes", {ANY: LatencyOptions}, "latency:compare", spins=True
    ),
    "push": Command("send a finished checkpoint to the Hugging Face hub", {ANY: PushOptions}, "push:push"),
    "inspect": Command(
        "sizes, MACs and bytes of a checkpoint, layer by layer, without loading its weights",
        {ANY: InspectOptions},
        "inspect:inspect",
    ),
}

SCRIPTS = {
    "prune_bert.py": ("prune", ENCODER),
    "prune_opt.py": ("prune", DECODER),
    "quantize_bert.py": ("quantize", ENCODER),
    "quantize_opt.py": ("quantize", DECODER),
    "opt_eval.py": ("evaluate", DECODER),
}
"""Old names of commands, for one kind of model each."""


def run_verb(name: str, arguments: Sequence[str] | None, *, prog: str = "", kind: str | None = None) -> int:
    """Run a command.

    Args:
        name: Of the command.
        arguments: Of the command line; the process's own by default.
        prog: What messages call it.
        kind: Of models; by default as the flags mean.

    Returns:
        The exit code.
    """
    prog = prog or f"shrinkformer {name}"
    return run_command(lambda given: _perform(COMMANDS[name], given, prog, kind), arguments, prog)


def run_script(script: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command by its old name."""
    name, kind = SCRIPTS[script]
    return run_verb(name, arguments, prog=script, kind=kind)


def _perform(command: Command, arguments: Sequence[str] | None, prog: str, kind: str | None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    classes = command.classes if kind is None else {kind: command.classes[kind]}
    flags = as_written(flags_of(classes, command.only), given)
    if {"-h", "--help", "--help-all"} & set(given):
        summary = f"{command.summary[0].upper()}{command.summary[1:]}."
        print(help_text(prog, summary, flags, everything="--help-all" in given), flush=True)
        return
    if not command.spins:
        wait_passively()
    options = build_options(classes, flags, parse_flags(flags, given, prog), kind_of_model, **command.fixed)
    quiet_libraries()
    with threads_of(options.threads) if hasattr(options, "threads") else nullcontext():
        work_of(command)(options)


def work_of(command: Command) -> Callable[[Any], None]:
    """The function that does a command's work; from here on heavy libraries are imported."""
    module, function = command.work.split(":")
    work: Callable[[Any], None] = getattr(importlib.import_module(f"shrinkformer.commands.{module}"), function)
    return work


def kind_of_model(given: Mapping[str, Any]) -> str:
    """Whether flags mean an encoder or a language model: by the task where one is named, else by the model.

    Args:
        given: Texts of flags by name.

    Raises:
        InputError: The model is nowhere.
    """
    task, name = given.get("task_name"), given.get("model_name", BUNDLED_MODEL)
    for kind, options in COMMANDS["prune"].classes.items():
        if task in flags_of({kind: options})["task_name"].about("choices"):
            return kind
    if name in {BUNDLED_MODEL, BUNDLED_DECODER}:
        return ENCODER if name == BUNDLED_MODEL else DECODER
    quiet_libraries()
    from shrinkformer.commands.locate import is_decoder  # takes the seconds that torch and transformers take

    return DECODER if is_decoder(name) else ENCODER
