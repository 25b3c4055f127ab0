"""Command-line options as validated data."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from shrinkformer.dataset.tasks import TASKS, get_task
from shrinkformer.errors import InputError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.checkpoint import may_be_replaced
from shrinkformer.prune.methods import DEFAULT_METHOD, METHODS, get_method

BUNDLED_MODEL = "all-MiniLM-L6-v2"


def option(default: Any, help_text: str, **argument: Any) -> Any:
    """A dataclass field that is also a command-line flag of the same name."""
    return field(default=default, metadata={"help": help_text, **argument})


@dataclass(frozen=True)
class PruneOptions:
    """Options of ``prune_bert.py``; every flag is a field.

    Raises:
        InputError: A value is out of its range, or a file or folder is not there.
    """

    model_name: str = option(
        BUNDLED_MODEL,
        "checkpoint: models/<name>/<task>, a folder, the bundled all-MiniLM-L6-v2, or a name on the hub",
    )
    task_name: str = option("similarity", f"task to calibrate on and to evaluate: {', '.join(TASKS)}")
    mu: tuple[float, ...] = option(
        (0.5,), "fraction of MACs that stays; several values share one calibration", nargs="+"
    )
    method: str = option(DEFAULT_METHOD, f"pruning method: {', '.join(METHODS)}")
    seed: int = option(0, "seed of the calibration sample")
    sample_batch_size: int = option(512, "number of calibration examples")
    data_dir: Path | None = option(None, "folder with data sets in the hub's column names; else the hub is asked")
    calibration_file: Path | None = option(None, "own calibration examples: .jsonl, .json, .parquet, .csv or .txt")
    bundled_data: bool = option(False, "use the small samples in the package where --data_dir has nothing")
    sequence_length: float | None = option(None, "length at which MACs count (default: mean of the evaluation set)")
    round_to: int = option(1, "keep a multiple of this many neurons in every block")
    min_heads: int = option(1, "heads that every block keeps at least")
    min_neurons: int = option(1, "neurons that every block keeps at least")
    batch_size: int = option(32, "examples per forward pass; changes speed and memory, not results")
    save_dir: Path | None = option(None, "where the pruned model goes (default: output/<model>/<task>-mu<mu>)")
    output_dir: Path = option(Path("output"), "where reports go")
    device: str = option("auto", "auto, cpu, cuda or cuda:<n>")
    dry_run: bool = option(False, "print what would be done, with sizes, memory and time, and stop")
    resume: bool = option(False, "take up the calibration of an earlier, interrupted run")

    def __post_init__(self) -> None:
        get_task(self.task_name)
        get_method(self.method)
        length = 1.0 if self.sequence_length is None else self.sequence_length  # the mean length is not known yet
        for mu in self.mu:
            Budget(mu, length, self.round_to, self.min_heads, self.min_neurons)
        for name in ("sample_batch_size", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative.")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise InputError(f"--data_dir {self.data_dir}: no such folder; leave it out to ask the hub.")
        if self.calibration_file is not None and not self.calibration_file.is_file():
            raise InputError(f"--calibration_file {self.calibration_file}: no such file.")
        require_writable("--output_dir", self.output_dir)
        if self.save_dir is not None:
            require_writable("--save_dir", self.save_dir)
            if len(self.mu) == 1 and not may_be_replaced(self.save_dir):
                raise InputError(
                    f"--save_dir {self.save_dir}: it holds something else than our checkpoints; choose a new folder."
                )
        resolve_device(self.device)


def require_writable(flag: str, folder: Path) -> None:
    """Check that a folder can be written, or made, without making it.

    Raises:
        InputError: It cannot.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{flag} {folder}: {existing} is a file; choose a folder.")
    if not os.access(existing, os.W_OK):
        raise InputError(f"{flag} {folder}: no permission to write in {existing}; choose another folder.")


def resolve_device(name: str) -> str:
    """The device that a ``--device`` value means.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r}: not a device; use auto, cpu, cuda or cuda:<n>.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s); use cpu.")
    return name


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument ") + f" (see {self.prog} --help)")


def parse_options(arguments: Sequence[str] | None, *, prog: str, description: str) -> PruneOptions:
    """Options from command-line arguments.

    Raises:
        InputError: An argument is not known or has a wrong value.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for entry in fields(PruneOptions):
        _add_flag(parser, entry)
    values = vars(parser.parse_args(arguments))
    values["mu"] = tuple(dict.fromkeys(values["mu"]))
    return PruneOptions(**values)


def _add_flag(parser: argparse.ArgumentParser, entry: "Field[Any]") -> None:
    extra = dict(entry.metadata)
    help_text = extra.pop("help")
    assert entry.default is not MISSING
    if entry.type is bool:
        parser.add_argument(f"--{entry.name}", action="store_true", help=help_text)
        return
    shown = " ".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
    if "default:" not in help_text and entry.default is not None:
        help_text += f" (default: {shown})"
    parser.add_argument(
        f"--{entry.name}", type=_VALUE_TYPES[str(entry.type)], default=entry.default, help=help_text, **extra
    )


_VALUE_TYPES: dict[str, Any] = {
    str(str): str,
    str(int): int,
    str(tuple[float, ...]): float,
    str(float | None): float,
    str(Path): Path,
    str(Path | None): Path,
}
