"""What a run found: one JSON object, and the same for people."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shrinkformer.commands.report_text import text_of
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.efficiency.rounding import Rounding
from shrinkformer.evaluate.paired import Scores, change
from shrinkformer.pictures.run_page import report_page
from shrinkformer.prune.columns import known_errors
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.surgery import kept_sizes
from shrinkformer.quantize.config import LayerReport, Quantized
from shrinkformer.utils.files import append_atomically, write_atomically

SCHEMA = 1

_PACKAGES = ("shrinkformer", "torch", "transformers", "datasets", "numpy", "scipy")


@dataclass(frozen=True)
class Measured:
    """Figures of one model.

    Attributes:
        metrics: The task's own names, and ``<name>_stderr`` for standard errors.
        macs: Multiply-accumulate operations for one input of mean length.
        parameters: Number of weights, shared ones counted once.
        bytes: Size of the weight file.
        latency_ms: Median milliseconds by shape, such as ``8x128`` for eight inputs of 128 tokens.
        runtimes: The same in other runtimes, by their names, such as ``onnxruntime``.
        deviations: What each evaluation example contributes to a metric, for paired comparisons; in no report.
    """

    metrics: dict[str, float]
    macs: float
    parameters: int
    bytes: int
    latency_ms: dict[str, float] = field(default_factory=dict)
    runtimes: dict[str, dict[str, float]] = field(default_factory=dict)
    deviations: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False, compare=False)

    def change_from(self, dense: "Measured") -> dict[str, float]:
        """How each metric differs from the dense model's, with the paired standard error where that is known."""
        return change(Scores(dense.metrics, dense.deviations), Scores(self.metrics, self.deviations))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the report."""
        return {
            "metrics": self.metrics,
            "macs": round(self.macs),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "latency_ms": self.latency_ms,
            **({"runtimes": self.runtimes} if self.runtimes else {}),
        }


@dataclass(frozen=True)
class Run:
    """One model, task and budget, from command line to result.

    Attributes:
        sample_batch_size: Examples that were asked for; ``calibration_inputs`` and ``calibration_tokens`` were used.
        mu: Fraction of the budget that was asked for; ``plan.ratio`` was reached.
        dense: The model that the run began with, whatever it was before: ``given`` says it.
        facts: What else was done, in words: by what it is called, in any order.
    """

    task_name: str
    model_name: str
    method: str
    mu: float
    seed: int
    sample_batch_size: int
    calibration_tokens: int
    device: str
    dense: Measured
    pruned: Measured | None
    plan: Plan | None
    save_dir: Path | None
    seconds: dict[str, float]
    peak_memory_bytes: int
    quantized: Measured | None = None
    quantization: Quantized | None = None
    target_ratio: float | None = None
    rounding: Rounding | None = None
    dense_layers: tuple[LayerSize, ...] = ()
    run_id: str = ""
    given: str = "dense"
    calibration_inputs: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that other programs read; design and README list its fields."""
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **({"run": self.run_id} if self.run_id else {}),
            "command": shlex.join([_program(), *sys.argv[1:]]),
            "model_name": self.model_name,
            "task_name": self.task_name,
            "method": self.method,
            "mu": self.mu,
            **({} if self.target_ratio is None else {"target_ratio": self.target_ratio}),
            **({} if self.rounding is None else {"round_to": asdict(self.rounding)}),
            "seed": self.seed,
            "sample_batch_size": self.sample_batch_size,
            "calibration_tokens": self.calibration_tokens,
            "calibration_inputs": self.calibration_inputs,
            "given": self.given,
            "facts": dict(self.facts),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **versions()},
            "dense": self.dense.to_dict(),
        }
        if self.pruned is not None and self.plan is not None:
            record |= {
                "pruned": self.pruned.to_dict(),
                "sequence_length": self.plan.sequence_length,
                "budget": self.plan.budget,
                "layers": _plan_rows(self.plan, self.errors),
                "dense_layers": [kept_sizes(size) for size in self.dense_layers],
                **({"uniform": self.plan.uniform} if self.plan.uniform else {}),
                **({"divergence": self.plan.prediction} if self.plan.prediction else {}),
                **({"held_out_divergence": self.plan.divergences} if self.plan.divergences else {}),
            }
        if self.quantized is not None and self.quantization is not None:
            record |= _quantized_section(self.quantized, self.quantization, self.calibration_tokens)
        if self._last is not None:
            made = [(name, some) for name, some in self.models.items() if some is not self.dense]
            record["change"] = {name: some.change_from(self.dense) for name, some in made}
            record |= {"ratio": self._ratio(self._last), "save_dir": str(self.save_dir) if self.save_dir else None}
        record["seconds"] = {name: round(value, 3) for name, value in self.seconds.items()}
        record["peak_memory_bytes"] = self.peak_memory_bytes
        return record

    @property
    def models(self) -> dict[str, Measured]:
        """The models that there are, in the order in which the run made them."""
        named = {"dense": self.dense, "pruned": self.pruned, "quantized": self.quantized}
        return {name: figures for name, figures in named.items() if figures is not None}

    @property
    def _last(self) -> Measured | None:
        """Figures of the model that was saved."""
        return self.pruned if self.quantized is None else self.quantized

    def _ratio(self, last: Measured) -> dict[str, Any]:
        largest = list(self.dense.latency_ms)[-1] if self.dense.latency_ms else None  # the largest batch comes last
        return {
            "macs": 1.0 if self.plan is None else self.plan.ratio,
            "parameters": last.parameters / self.dense.parameters,
            "bytes": last.bytes / self.dense.bytes,
            "latency": last.latency_ms[largest] / self.dense.latency_ms[largest] if largest else None,
        }

    @property
    def errors(self) -> list[tuple[float | None, float | None]]:
        """Errors of the sublayers of each pruned block, None where they say nothing."""
        return [] if self.plan is None else known_errors(self.plan, self.dense_layers, self.calibration_tokens)

    def table(self) -> str:
        """The same for people."""
        return text_of(self)


def _plan_rows(plan: Plan, errors: Sequence[tuple[float | None, float | None]]) -> list[dict[str, Any]]:
    return [
        {
            "layer": index,
            "heads": len(layer.heads),
            "neurons": len(layer.neurons),
            **({"query_width": layer.query_width, "value_width": layer.value_width} if layer.value_width else {}),
            "attention_error": attention,
            "ffn_error": ffn,
        }
        for index, (layer, (attention, ffn)) in enumerate(zip(plan.layers, errors, strict=True))
    ]


def _quantized_section(figures: Measured, found: Quantized, tokens: int) -> dict[str, Any]:
    config = found.config
    settings = {
        "bits": config.bits if config.bits_of is None else None,
        "group_size": found.group_sizes[0] if len(found.group_sizes) == 1 else None,
        **({} if found.group_sizes == [config.group_size] else {"group_sizes": found.group_sizes}),
        "group_size_asked": config.group_size,
        "symmetric": config.symmetric,
        "quantizer": config.quantizer,
        "scope": config.layers,
        "also": list(config.also),
    }
    return {
        "quantized": figures.to_dict() | settings,
        "quantized_layers": [_quantized_row(row, tokens) for row in found.layers],
    }


def _quantized_row(layer: LayerReport, tokens: int) -> dict[str, Any]:
    error, nearest = layer.known_errors(tokens)
    known = {"error": error, "nearest_error": nearest, "error_of": "outputs" if layer.fitted else "weights"}
    return {**asdict(layer), **known}


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _is_reported(run: Run, records: Path) -> bool:
    if not run.run_id or not records.exists():
        return False
    mark = f'"run": {json.dumps(run.run_id)}'
    lines = [line for line in records.read_text(encoding="utf-8").splitlines() if mark in line]
    return any(json.loads(line)["mu"] == run.mu for line in lines)


def write_report(run: Run, stem: Path) -> Path:
    """Append a run to ``<stem>.txt`` and to the ``<stem>.jsonl`` beside it, and draw all runs in ``<stem>.html``.

    What a run that was killed right after its report says again when it is taken up is not appended twice.

    Returns:
        The path of the text file.
    """
    path, records = stem.with_name(f"{stem.name}.txt"), stem.with_name(f"{stem.name}.jsonl")
    if not _is_reported(run, records):
        append_atomically(path, run.table() + "\n\n")
        append_atomically(records, json.dumps(run.to_dict()) + "\n")
    page = report_page(records.read_text(encoding="utf-8").splitlines())
    if page is not None:
        write_atomically(stem.with_name(f"{stem.name}.html"), page)
    return path


def _program() -> str:
    """The command of this process, as somebody would type it."""
    name = Path(sys.argv[0]).name
    return "shrinkformer" if name == "__main__.py" else name
