"""Options of ``shrinkformer latency``."""

from dataclasses import dataclass
from pathlib import Path

from shrinkformer.commands.options import DTYPES, option, require_writable, resolve_device
from shrinkformer.commands.runtimes import EAGER, ONNX, RUNTIMES
from shrinkformer.errors import InputError

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
        "folders or names of models: dense, pruned or quantized; ratios are to the first",
        nargs="+",
        positional=True,
    )
    batch: tuple[int, ...] = option((1, 8, 32), "numbers of inputs per forward pass", nargs="+")
    length: tuple[int, ...] = option((32, 128), "numbers of tokens per input", nargs="+")
    runtime: tuple[str, ...] = option((EAGER,), f"one or several of {', '.join(RUNTIMES)}", nargs="+")
    decode: bool = option(False, "language models: time one cached decoding step, too (runtime eager)")
    device: str = option("auto", "auto, cpu, cuda or cuda:<n>")
    dtype: str = option("auto", f"type of the weights: {', '.join(DTYPES)}; auto: float32, on a GPU as stored")
    threads: int | None = option(None, "threads on the CPU (default: as many as torch takes)")
    repeats: int = option(15, "timed runs of each model and shape")
    seed: int = option(0, "seed of the random tokens")
    output: Path | None = option(None, "JSON lines are appended to this file")
    markdown: bool = option(False, "print the table as Markdown")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the inputs, (examples, tokens)."""
        return [(batch, length) for length in self.length for batch in self.batch]

    @property
    def longest(self) -> int:
        """Tokens of the longest context that a model gets."""
        return max(self.length) + (WARMUP + self.repeats if self.decode else 0)

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            for value in getattr(self, name):
                if value < 1:
                    raise InputError(f"--{name} {value}: must be at least 1.")
        if self.repeats < 1:
            raise InputError(f"--repeats {self.repeats}: must be at least 1.")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads {self.threads}: must be at least 1.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative.")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        self._check_runtimes()
        if self.output is not None:
            if self.output.is_dir():
                raise InputError(f"--output {self.output}: it is a folder; give a file, such as latency.jsonl.")
            require_writable("--output", self.output.parent)

    def _check_runtimes(self) -> None:
        for name in self.runtime:
            if name not in RUNTIMES:
                raise InputError(f"--runtime {name!r}: choose among {', '.join(RUNTIMES)}.")
        if self.decode and EAGER not in self.runtime:
            raise InputError(f"--decode: only the runtime {EAGER} decodes with a cache; add {EAGER} to --runtime.")
        device = resolve_device(self.device)
        if ONNX in self.runtime and device != "cpu":
            raise InputError(f"--runtime {ONNX}: it is run on the CPU, not on {device}; pass --device cpu.")
        if ONNX in self.runtime and self.dtype not in {"auto", "float32"}:
            raise InputError(f"--dtype {self.dtype}: --runtime {ONNX} computes in float32; leave one of them out.")
