"""Command-line options as validated data."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from shrinkformer.commands.tracking import TRACKERS, require_trackers
from shrinkformer.dataset.corpora import CORPORA, get_corpus, require_different_files
from shrinkformer.dataset.tasks import TASKS, get_task
from shrinkformer.errors import InputError
from shrinkformer.export.runtime import require_onnx
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.checkpoint import may_be_replaced
from shrinkformer.prune.methods import DEFAULT_METHOD, METHOD_NAMES, SHRINK, WHOLE_MODEL, require_method
from shrinkformer.utils.hub import require_hub

BUNDLED_MODEL = "all-MiniLM-L6-v2"
BUNDLED_DECODER = "opt-mini"
BUDGETS = ("macs", "latency")
AUTO = "auto"
EXPORTS = ("onnx",)


def option(default: Any, help_text: str, **argument: Any) -> Any:
    """A dataclass field that is also a command-line flag of the same name."""
    return field(default=default, metadata={"help": help_text, **argument})


def multiple(text: str) -> int | None:
    """A value of ``--round_to``: a number, or None for ``auto``."""
    if text == AUTO:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


@dataclass(frozen=True)
class PruneOptions:
    """Options of every pruning command; every flag is a field.

    Raises:
        InputError: A value is out of its range, or a file or folder is not there.
    """

    excludes: ClassVar[Mapping[str, Mapping[str, str]]] = {}  # flags that cannot stand beside one, and why

    model_name: str = option("", "checkpoint: models/<name>/<task>, a folder, a bundled model, or a name on the hub")
    mu: tuple[float, ...] = option(
        (0.5,), "fraction of MACs that stays; several values share one calibration", nargs="+"
    )
    method: str = option(DEFAULT_METHOD, f"pruning method: {', '.join(METHOD_NAMES)}")
    whole_heads: bool = option(False, "method shrink: keep the width of heads, remove whole heads only")
    search_seconds: float = option(
        120.0, "method shrink: the search for a better plan stops after so long, for each budget; 0: no search"
    )
    uniform: bool = option(
        False, "all blocks keep as many heads and neurons, so that the result has the shape of a stock model"
    )
    budget: str = option("macs", f"what --mu is a fraction of: {', '.join(BUDGETS)} (method shrink, on this machine)")
    latency_shape: tuple[int, ...] = option((8, 128), "examples and tokens of the input to time", nargs=2)
    seed: int = option(0, "seed of the calibration sample")
    sample_batch_size: int = option(512, "number of calibration examples")
    data_dir: Path | None = option(None, "folder with data sets in the hub's column names; else the hub is asked")
    bundled_data: bool = option(False, "use the small samples in the package where --data_dir has nothing")
    round_to: int | None = option(
        1,
        "keep a multiple of this many neurons in every block; auto: of what this machine is fastest with, by measuring",
        type=multiple,
    )
    min_heads: int = option(1, "heads that every block keeps at least")
    min_neurons: int = option(1, "neurons that every block keeps at least")
    batch_size: int = option(32, "examples per forward pass; changes speed and memory, not results")
    save_dir: Path | None = option(None, "where the pruned model goes (default: below --output_dir)")
    output_dir: Path = option(Path("output"), "where reports go")
    export: str | None = option(
        None, f"also write the pruned model for another runtime, and time it there: {', '.join(EXPORTS)}"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:<n>")
    max_memory: float | None = option(
        None,
        "GiB that weights and statistics may take; larger models pass block by block (default: 80 %% of what is free)",
    )
    offload_dir: Path | None = option(None, "folder for what does not fit into memory (default: below --output_dir)")
    dry_run: bool = option(False, "print what would be done, with sizes, memory and time, and stop")
    resume: bool = option(False, "take up the calibration of an earlier, interrupted run")
    push_to_hub: str = option("", "name on the hub, user/name, to send the finished checkpoint to (default: nowhere)")
    private: bool = option(False, "with --push_to_hub: make a new repository private")
    report_to: tuple[str, ...] = option((), f"send the figures to {', '.join(TRACKERS)} as well", nargs="+")

    @property
    def mac_length(self) -> float | None:
        """Length at which MACs are counted, where the user gave one."""
        return getattr(self, "sequence_length", None)

    @property
    def quantizes(self) -> bool:
        """Whether blocks are quantized, which takes more memory."""
        return False

    @property
    def shrinks(self) -> bool:
        """Whether a model is pruned by our own method."""
        return self.method == SHRINK and any(mu < 1 for mu in self.mu)

    @property
    def measures_whole(self) -> bool:
        """Whether a model is pruned by a method that needs it in memory as a whole."""
        return self.method in WHOLE_MODEL and any(mu < 1 for mu in self.mu)

    @property
    def keeps_whole_heads(self) -> bool:
        """Whether heads keep their width."""
        return self.whole_heads

    @property
    def calibrates(self) -> bool:
        """Whether examples are needed."""
        return any(mu < 1 for mu in self.mu)

    def _check_flags_of_shrink(self) -> None:
        if not self.search_seconds >= 0:
            raise InputError(f"--search_seconds {self.search_seconds}: must not be negative.")
        if self.budget not in BUDGETS:
            raise InputError(f"--budget {self.budget!r}: choose one of {', '.join(BUDGETS)}.")
        if self.budget == "latency" and self.method != SHRINK:
            raise InputError(f"--budget latency: --method {self.method} counts MACs only; use --method {SHRINK}.")
        if len(self.latency_shape) != 2 or min(self.latency_shape) < 1:
            shown = " ".join(map(str, self.latency_shape))
            raise InputError(f"--latency_shape {shown}: give two positive numbers, examples and tokens.")

    def _check_export(self) -> None:
        if self.export is None:
            return
        if self.export not in EXPORTS:
            raise InputError(f"--export {self.export!r}: choose one of {', '.join(EXPORTS)}.")
        if self.quantizes:
            raise InputError(
                f"--export {self.export}: quantized models are written as ONNX by --format onnx; use that."
            )
        if all(mu == 1 for mu in self.mu):
            raise InputError(
                f"--export {self.export}: at --mu 1 no model is written; use shrinkformer export for the dense one."
            )
        require_onnx(f"--export {self.export}")

    def __post_init__(self) -> None:
        require_method(self.method, uniform=self.uniform)
        self._check_flags_of_shrink()
        length = 1.0 if self.mac_length is None else self.mac_length  # the mean length is not known yet
        round_to = 1 if self.round_to is None else self.round_to
        for mu in self.mu:
            Budget(mu, length, round_to, self.min_heads, self.min_neurons)
        for name in ("sample_batch_size", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative.")
        self._check_export()
        if self.max_memory is not None and not self.max_memory > 0:
            raise InputError(f"--max_memory {self.max_memory}: must be positive; it is in GiB.")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise InputError(f"--data_dir {self.data_dir}: no such folder; leave it out to ask the hub.")
        for name in ("calibration_file", "evaluation_file"):
            file = getattr(self, name, None)
            if file is not None and not file.is_file():
                raise InputError(f"--{name} {file}: no such file.")
        for name in ("output_dir", "save_dir", "offload_dir"):
            if getattr(self, name) is not None:
                require_writable(f"--{name}", getattr(self, name))
        if self.save_dir is not None and len(self.mu) == 1 and not may_be_replaced(self.save_dir):
            raise InputError(
                f"--save_dir {self.save_dir}: it holds something else than our checkpoints; choose a new folder."
            )
        resolve_device(self.device)
        self._check_publishing()

    def _check_publishing(self) -> None:
        require_trackers(self.report_to)
        if self.private and not self.push_to_hub:
            raise InputError("--private: it is said of a repository on the hub; add --push_to_hub USER/NAME.")
        if self.push_to_hub:
            if not self.quantizes and not any(mu < 1 for mu in self.mu):
                raise InputError(f"--push_to_hub {self.push_to_hub}: --mu 1 saves nothing; choose a smaller --mu.")
            require_hub("--push_to_hub", self.push_to_hub)


@dataclass(frozen=True)
class EncoderOptions(PruneOptions):
    """Options of ``prune_bert.py``."""

    model_name: str = option(
        BUNDLED_MODEL,
        "checkpoint: models/<name>/<task>, a folder, the bundled all-MiniLM-L6-v2, or a name on the hub",
    )
    task_name: str = option("similarity", f"task to calibrate on and to evaluate: {', '.join(TASKS)}")
    calibration_file: Path | None = option(None, "own calibration examples: .jsonl, .json, .parquet, .csv or .txt")
    sequence_length: float | None = option(None, "length at which MACs count (default: mean of the evaluation set)")

    def __post_init__(self) -> None:
        get_task(self.task_name)
        super().__post_init__()


_CORPORA = ", ".join(CORPORA)


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of ``opt_eval.py``, and of every command that measures perplexity."""

    model_name: str = option(
        BUNDLED_DECODER,
        "checkpoint: models/<name>, a folder, the bundled opt-mini, or a name on the hub (opt-125M too)",
    )
    evaluation_file: Path | None = option(None, "own text to measure perplexity on beside the corpora: UTF-8")
    sequence_length: int | None = option(None, "tokens per window (default: as many as the model takes, at most 4096)")
    evaluation_windows: int | None = option(None, "only so many windows of each corpus, for a quick look")
    lm_eval: tuple[str, ...] = option((), "tasks of EleutherAI's harness to run on the models as well", nargs="*")
    dtype: str = option(
        "auto", "type of the weights in memory: auto (float32, on a GPU as stored), float32, bfloat16, float16"
    )


@dataclass(frozen=True)
class DecoderOptions(EvaluationOptions, PruneOptions):
    """Options of ``prune_opt.py``."""

    task: str = option("wikitext2", f"corpus to calibrate on: {_CORPORA}; perplexity is measured on all of them")
    mu: tuple[float, ...] = option(
        (0.7,), "fraction of MACs that stays; several values share one calibration", nargs="+"
    )
    sample_batch_size: int = option(128, "number of calibration windows")
    batch_size: int = option(8, "windows per forward pass; changes speed and memory, not results")
    calibration_file: Path | None = option(None, "own calibration text instead of --task's: UTF-8")

    def __post_init__(self) -> None:
        get_corpus(self.task)
        if self.sequence_length is not None and self.sequence_length < 2:
            raise InputError(f"--sequence_length {self.sequence_length}: must be at least 2 tokens.")
        if self.evaluation_windows is not None and self.evaluation_windows < 1:
            raise InputError(f"--evaluation_windows {self.evaluation_windows}: must be at least 1.")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        super().__post_init__()
        if self.calibration_file is not None and self.evaluation_file is not None:
            require_different_files(self.calibration_file, self.evaluation_file)


DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError):
        raise InputError(f"--device {name}: nothing can be computed there; use auto, cpu, cuda or cuda:<n>.") from None
    return name
