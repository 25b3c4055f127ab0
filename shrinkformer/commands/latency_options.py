"""Options of ``shrinkformer latency``."""

from dataclasses import dataclass
from pathlib import Path

from shrinkformer.commands.flags import check_values, option
from shrinkformer.commands.options import DTYPES, require_writable, resolve_device, threads_option
from shrinkformer.errors import InputError

EAGER, COMPILE, ONNX = "eager", "compile", "onnx"

RUNTIMES = (EAGER, COMPILE, ONNX)
"""What models are run by, see :mod:`shrinkformer.commands.runtimes`."""

WARMUP = 2
"""Runs of each model and shape that are not timed."""


@dataclass(frozen=True)
class LatencyOptions:
    """What is timed, and how.

    Raises:
        InputError: A value is out of its range.
    """

    models: tuple[str, ...] = option(
        (),
        "folders or names of models",
        more="dense, pruned or quantized; ratios are to the first",
        nargs="+",
        positional=True,
        metavar="MODEL",
    )
    batch: tuple[int, ...] = option(
        (1, 8, 32), "numbers of inputs per forward pass", group="data", nargs="+", distinct=True
    )
    length: tuple[int, ...] = option((32, 128), "numbers of tokens per input", group="data", nargs="+", distinct=True)
    seed: int = option(0, "seed of the random tokens", group="data")
    runtime: tuple[str, ...] = option(
        (EAGER,), "one or several", group="method", choices=RUNTIMES, nargs="+", distinct=True
    )
    decode: bool = option(
        False, "language models: time one cached decoding step, too", group="method", more="runtime eager"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:<n>", group="method")
    dtype: str = option(
        "auto",
        "type of the weights",
        group="method",
        choices=DTYPES,
        more="auto is float32, on a GPU as stored",
    )
    threads: int | None = threads_option(group="method")
    repeats: int = option(15, "timed runs of each model and shape", group="method")
    output: Path | None = option(None, "JSON lines are appended to this file", group="output")
    markdown: bool = option(False, "print the table as Markdown", group="output")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the inputs, (examples, tokens)."""
        return [(batch, length) for length in self.length for batch in self.batch]

    @property
    def longest(self) -> int:
        """Tokens of the longest context that a model gets."""
        return max(self.length) + (WARMUP + self.repeats if self.decode else 0)

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("batch", "length"):
            for value in getattr(self, name):
                if value < 1:
                    raise InputError(f"--{name} {value}: must be at least 1.")
        if self.repeats < 1:
            raise InputError(f"--repeats {self.repeats}: must be at least 1.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative.")
        self._check_runtimes()
        if self.output is not None:
            if self.output.is_dir():
                raise InputError(f"--output {self.output}: it is a folder; give a file, such as latency.jsonl.")
            require_writable("--output", self.output.parent)

    def _check_runtimes(self) -> None:
        if self.decode and EAGER not in self.runtime:
            raise InputError(f"--decode: only the runtime {EAGER} decodes with a cache; add {EAGER} to --runtime.")
        device = resolve_device(self.device)
        if ONNX in self.runtime and device != "cpu":
            raise InputError(f"--runtime {ONNX}: it is run on the CPU, not on {device}; pass --device cpu.")
        if ONNX in self.runtime and self.dtype not in {"auto", "float32"}:
            raise InputError(f"--dtype {self.dtype}: --runtime {ONNX} computes in float32; leave one of them out.")
