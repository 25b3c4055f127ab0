"""Command-line options as validated data.

Nothing heavy is imported here: what a flag is, and whether its value makes sense, is known without torch. Checks that
look at the machine (its devices, packages, the hub) import what they need when all others have passed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from shrinkformer.commands.flags import changed, check_values, option
from shrinkformer.commands.tracking import TRACKERS, require_trackers
from shrinkformer.dataset.corpus import CORPORA, get_corpus
from shrinkformer.dataset.tasks import TASKS, get_task
from shrinkformer.errors import InputError
from shrinkformer.prune.limits import Budget
from shrinkformer.prune.names import DEFAULT_METHOD, METHOD_NAMES, SHRINK, WHOLE_MODEL, require_method

if TYPE_CHECKING:
    import torch

BUNDLED_MODEL = "all-MiniLM-L6-v2"
BUNDLED_DECODER = "opt-mini"
BUDGETS = ("macs", "latency")
AUTO = "auto"
EXPORTS = ("onnx",)
DTYPES = (AUTO, "float32", "bfloat16", "float16")


def multiple(text: str) -> int | None:
    """A value of ``--round_to``: a number, or None for ``auto``."""
    if text == AUTO:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a whole number, or {AUTO}") from None


def require_fraction(mu: float) -> None:
    """Check a value of ``--mu``.

    Raises:
        InputError: It is none.
    """
    Budget(mu, sequence_length=1.0)


def require_threads(count: int | None) -> None:
    """Check a value of ``--threads``; None is the default.

    Raises:
        InputError: It is not positive.
    """
    if count is not None and count < 1:
        raise InputError(f"--threads {count}: must be at least 1.")


def threads_option(**more: Any) -> Any:
    """``--threads``, the same for every command that computes; see :mod:`shrinkformer.utils.threads`."""
    return option(
        None,
        "threads on the CPU",
        check=require_threads,
        more="by default OMP_NUM_THREADS, or as many as there are cores that this process may use",
        **more,
    )


@dataclass(frozen=True)
class EvaluateOptions:
    """What every command has that measures a model."""

    model_name: str = option(
        "", "folder, name below models/ or on the hub, or a bundled model", positional="too", metavar="MODEL"
    )
    task_name: str = option("", "task, or corpus, to measure on", group="data", aliases=("task",))
    data_dir: Path | None = option(
        None, "folder with data sets in the hub's column names", group="data", more="without it the hub is asked"
    )
    bundled_data: bool = option(
        False, "use the small samples in the package", group="data", more="where --data_dir has nothing"
    )
    sequence_length: float | None = option(
        None,
        "tokens at which MACs count",
        group="budget",
        advanced=True,
        more="by default the mean of the evaluation set; for language models tokens per window, by default as many as "
        "the model takes, at most 4096",
    )
    batch_size: int = option(
        32,
        "examples per forward pass",
        group="model",
        advanced=True,
        more="changes speed and memory, results by no more than rounding",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:<n>", advanced=True)
    threads: int | None = threads_option(advanced=True)
    max_memory: float | None = option(
        None,
        "GiB that weights and statistics may take",
        advanced=True,
        more="larger models pass block by block; 80 % of what is free by default",
    )
    offload_dir: Path | None = option(
        None, "folder for what does not fit into memory", advanced=True, more="below --output_dir by default"
    )
    output_dir: Path = option(Path("output"), "where reports go", group="output")
    dry_run: bool = option(False, "print sizes, memory and time, and stop", group="output")
    report_to: tuple[str, ...] = option(
        (), "send the figures there, too", group="output", advanced=True, choices=TRACKERS, nargs="+", distinct=True
    )


@dataclass(frozen=True)
class PruneOptions(EvaluateOptions):
    """Options of every pruning command; every flag is a field.

    Raises:
        InputError: A value is out of its range, or a file or folder is not there.
    """

    excludes: ClassVar[Mapping[str, Mapping[str, str]]] = {}  # flags that cannot stand beside one, and why

    mu: tuple[float, ...] = option(
        (0.5,),
        "fraction of MACs that stays; one or several values",
        group="budget",
        more="several share one calibration",
        nargs="+",
        distinct=True,
        check=require_fraction,
    )
    calibration_file: Path | None = option(
        None,
        "own examples, unlabelled, to calibrate on",
        group="data",
        more=".jsonl, .json, .parquet, .csv, .tsv or .txt; language models take the column text",
    )
    sample_batch_size: int = option(
        512, "number of calibration examples", group="data", more="windows of language models"
    )
    seed: int = option(0, "seed of the calibration sample", group="data", advanced=True)
    uniform: bool = option(
        False,
        "all blocks alike: loads without code of ours",
        group="budget",
        more="all blocks keep as many heads and neurons, so that the result has the shape of a stock model",
    )
    budget: str = option(
        "macs",
        "what --mu is a fraction of",
        group="budget",
        advanced=True,
        choices=BUDGETS,
        more="latency is that of this machine, for method shrink",
    )
    latency_shape: tuple[int, ...] = option(
        (8, 128), "examples and tokens of the input to time", group="budget", advanced=True, nargs=2
    )
    round_to: int | None = option(
        1,
        "keep a multiple of this many neurons in every block",
        group="budget",
        advanced=True,
        more="auto: of what this machine is fastest with, by measuring",
        type=multiple,
    )
    min_heads: int = option(1, "heads that every block keeps at least", group="budget", advanced=True)
    min_neurons: int = option(1, "neurons that every block keeps at least", group="budget", advanced=True)
    method: str = option(DEFAULT_METHOD, "pruning method; stat takes seconds", group="method", choices=METHOD_NAMES)
    search_seconds: float = option(
        120.0,
        "longest search for a better plan",
        group="method",
        more="of method shrink, for each budget; 0 for no search",
    )
    whole_heads: bool = option(
        False,
        "remove whole heads only",
        group="method",
        advanced=True,
        more="method shrink keeps the width of heads",
    )
    save_dir: Path | None = option(None, "where the model goes", group="output", more="below --output_dir by default")
    export: str | None = option(
        None,
        "also write the pruned model for another runtime",
        group="output",
        advanced=True,
        choices=EXPORTS,
        more="and time it there",
    )
    resume: bool = option(False, "take up an earlier, interrupted run", group="output")
    push_to_hub: str = option("", "send the checkpoint to USER/NAME on the hub", group="output")
    private: bool = option(False, "with --push_to_hub: make a new repository private", group="output", advanced=True)

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
        """Whether a model is made."""
        return any(mu < 1 for mu in self.mu)

    @property
    def reads_examples(self) -> bool:
        """Whether something is learnt from calibration examples."""
        return any(mu < 1 for mu in self.mu)

    def __post_init__(self) -> None:
        check_values(self)
        self._check_numbers()
        self._check_flags_of_shrink()
        self._check_paths()
        self._check_export()
        self._check_publishing()
        resolve_device(self.device)

    def _check_numbers(self) -> None:
        require_method(self.method, uniform=self.uniform)
        length = 1.0 if self.sequence_length is None else self.sequence_length  # the mean length is not known yet
        round_to = 1 if self.round_to is None else self.round_to
        for mu in self.mu:
            Budget(mu, length, round_to, self.min_heads, self.min_neurons)
        for name in ("sample_batch_size", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative.")
        if self.max_memory is not None and not self.max_memory > 0:
            raise InputError(f"--max_memory {self.max_memory}: must be positive; it is in GiB.")

    def _check_flags_of_shrink(self) -> None:
        if not self.search_seconds >= 0:
            raise InputError(f"--search_seconds {self.search_seconds}: must not be negative.")
        if self.budget == "latency" and self.method != SHRINK:
            raise InputError(f"--budget latency: --method {self.method} counts MACs only; use --method {SHRINK}.")
        if len(self.latency_shape) != 2 or min(self.latency_shape) < 1:
            shown = " ".join(map(str, self.latency_shape))
            raise InputError(f"--latency_shape {shown}: give two positive numbers, examples and tokens.")

    def _check_paths(self) -> None:
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise InputError(f"--data_dir {self.data_dir}: no such folder; leave it out to ask the hub.")
        for name in ("calibration_file", "evaluation_file"):
            file = getattr(self, name, None)
            if file is not None and not file.is_file():
                raise InputError(f"--{name} {file}: no such file.")
        for name in ("output_dir", "save_dir", "offload_dir"):
            if getattr(self, name) is not None:
                require_writable(f"--{name}", getattr(self, name))
        if self.save_dir is not None and len(self.mu) == 1:
            from shrinkformer.prune.checkpoint import may_be_replaced

            if not may_be_replaced(self.save_dir):
                raise InputError(
                    f"--save_dir {self.save_dir}: it holds something else than our checkpoints; choose a new folder."
                )

    def _check_export(self) -> None:
        if self.export is None:
            return
        if self.quantizes:
            raise InputError(
                f"--export {self.export}: quantized models are written as ONNX by --format onnx; use that."
            )
        if all(mu == 1 for mu in self.mu):
            raise InputError(
                f"--export {self.export}: at --mu 1 no model is written; use shrinkformer export for the dense one."
            )
        from shrinkformer.export.runtime import require_onnx

        require_onnx(f"--export {self.export}")

    def _check_publishing(self) -> None:
        require_trackers(self.report_to)
        if self.private and not self.push_to_hub:
            raise InputError("--private: it is said of a repository on the hub; add --push_to_hub USER/NAME.")
        if self.push_to_hub:
            if not self.quantizes and not any(mu < 1 for mu in self.mu):
                raise InputError(f"--push_to_hub {self.push_to_hub}: --mu 1 saves nothing; choose a smaller --mu.")
            from shrinkformer.utils.hub import require_hub

            require_hub("--push_to_hub", self.push_to_hub)


@dataclass(frozen=True)
class EncoderOptions(PruneOptions):
    """Options for encoders."""

    model_name: str = changed(PruneOptions, "model_name", BUNDLED_MODEL)
    task_name: str = changed(
        PruneOptions,
        "task_name",
        "",
        choices=tuple(TASKS),
        more="without one the bundled encoder is measured on similarity, and any other keeps its own head and is "
        "judged by how far its answers move from those of the dense model",
    )

    @property
    def judged_by(self) -> str:
        """The task; "" for the checkpoint's own head, judged without labels."""
        return self.task_name or ("similarity" if self.model_name == BUNDLED_MODEL else "")

    def __post_init__(self) -> None:
        if self.judged_by:
            get_task(self.judged_by)
        else:
            self._check_without_task()
        super().__post_init__()

    def _check_without_task(self) -> None:
        if self.data_dir is not None:
            raise InputError(
                f"--data_dir {self.data_dir}: data sets there belong to tasks; add --task_name, or pass your own texts "
                "as --calibration_file."
            )
        if not self.quantizes and all(mu == 1 for mu in self.mu):
            raise InputError(
                f"--task_name: without one nothing says how good {self.model_name} is as it stands, only how far "
                f"another model is from it; choose one of {', '.join(TASKS)}, or look at it with shrinkformer inspect."
            )


@dataclass(frozen=True)
class DecoderEvaluateOptions:
    """What commands that measure perplexity have beside :class:`EvaluateOptions`."""

    evaluation_file: Path | None = option(
        None,
        "own text to measure perplexity on",
        group="data",
        advanced=True,
        more="beside the corpora; the same types of files",
    )
    evaluation_windows: int | None = option(
        None, "only so many windows of each corpus", group="data", advanced=True, more="for a quick look"
    )
    lm_eval: tuple[str, ...] = option(
        (), "tasks of EleutherAI's harness to run, too", group="data", advanced=True, nargs="*", distinct=True
    )
    dtype: str = option(
        AUTO,
        "type of the weights in memory",
        advanced=True,
        choices=DTYPES,
        more="auto is float32, on a GPU as stored",
    )


@dataclass(frozen=True)
class DecoderOptions(DecoderEvaluateOptions, PruneOptions):
    """Options for language models."""

    model_name: str = changed(PruneOptions, "model_name", BUNDLED_DECODER)
    task_name: str = changed(PruneOptions, "task_name", "wikitext2", choices=tuple(CORPORA))
    mu: tuple[float, ...] = changed(PruneOptions, "mu", (0.7,))
    sample_batch_size: int = changed(PruneOptions, "sample_batch_size", 128)
    batch_size: int = changed(PruneOptions, "batch_size", 8)
    sequence_length: int | None = changed(PruneOptions, "sequence_length", None)

    def __post_init__(self) -> None:
        get_corpus(self.task_name)
        if self.sequence_length is not None and self.sequence_length < 2:
            raise InputError(f"--sequence_length {self.sequence_length}: must be at least 2 tokens.")
        if self.evaluation_windows is not None and self.evaluation_windows < 1:
            raise InputError(f"--evaluation_windows {self.evaluation_windows}: must be at least 1.")
        super().__post_init__()
        if self.calibration_file is not None and self.evaluation_file is not None:
            from shrinkformer.dataset.corpora import require_different_files

            require_different_files(self.calibration_file, self.evaluation_file)


def torch_dtype(name: str) -> "torch.dtype | None":
    """The type that a ``--dtype`` value means; None for ``auto``."""
    import torch

    found: torch.dtype | None = None if name == AUTO else getattr(torch, name)
    return found


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
    import torch

    if name == AUTO:
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
