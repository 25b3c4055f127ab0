"""What a run found: one JSON object, and the same for people."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shrinkformer.prune.plan import Plan
from shrinkformer.utils.files import append_atomically

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
    """

    metrics: dict[str, float]
    macs: float
    parameters: int
    bytes: int
    latency_ms: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the report."""
        return {
            "metrics": self.metrics,
            "macs": round(self.macs),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "latency_ms": self.latency_ms,
        }


@dataclass(frozen=True)
class Run:
    """One model, task and budget, from command line to result."""

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

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that other programs read; design and README list its fields."""
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "model_name": self.model_name,
            "task_name": self.task_name,
            "method": self.method,
            "mu": self.mu,
            "seed": self.seed,
            "sample_batch_size": self.sample_batch_size,
            "calibration_tokens": self.calibration_tokens,
            "device": self.device,
            "versions": {"python": platform.python_version(), **versions()},
            "dense": self.dense.to_dict(),
        }
        if self.pruned is not None and self.plan is not None:
            record |= {
                "pruned": self.pruned.to_dict(),
                "ratio": self._ratio(self.pruned, self.plan),
                "sequence_length": self.plan.sequence_length,
                "layers": [
                    {
                        "layer": index,
                        "heads": len(layer.heads),
                        "neurons": len(layer.neurons),
                        "attention_error": layer.attention_error,
                        "ffn_error": layer.ffn_error,
                    }
                    for index, layer in enumerate(self.plan.layers)
                ],
                "save_dir": str(self.save_dir) if self.save_dir else None,
            }
        record["seconds"] = {name: round(value, 3) for name, value in self.seconds.items()}
        record["peak_memory_bytes"] = self.peak_memory_bytes
        return record

    def _ratio(self, pruned: Measured, plan: Plan) -> dict[str, Any]:
        largest = list(self.dense.latency_ms)[-1] if self.dense.latency_ms else None  # the largest batch comes last
        return {
            "macs": plan.ratio,
            "parameters": pruned.parameters / self.dense.parameters,
            "bytes": pruned.bytes / self.dense.bytes,
            "latency": pruned.latency_ms[largest] / self.dense.latency_ms[largest] if largest else None,
        }

    def table(self) -> str:
        """The same for people."""
        title = (
            f"{self.model_name} on {self.task_name}: method {self.method}, mu {self.mu:g}, seed {self.seed}, "
            f"{self.sample_batch_size} examples ({self.calibration_tokens:,} tokens)"
        )
        lines = [title, "", f"  {'':22}{'dense':>18}{'pruned':>18}{'change':>12}"]
        lines += [_metric_row(name, self.dense, self.pruned) for name in _names(self.dense.metrics)]
        for name, unit, scale in (("macs", "M", 1e6), ("parameters", "M", 1e6), ("bytes", "MB", 1e6)):
            after = getattr(self.pruned, name) if self.pruned else None
            label = {"macs": "MACs", "bytes": "file size"}.get(name, name)
            lines.append(_ratio_row(f"{label} ({unit})", getattr(self.dense, name), after, scale))
        for shape, value in self.dense.latency_ms.items():
            after = self.pruned.latency_ms.get(shape) if self.pruned else None
            lines.append(_ratio_row(f"latency {shape} (ms)", value, after, 1.0))
        if self.plan is not None:
            lines += ["", f"  {'layer':>5}{'heads':>8}{'neurons':>10}{'attention error':>18}{'ffn error':>12}"]
            lines += [
                f"  {index:>5}{len(layer.heads):>8}{len(layer.neurons):>10}"
                f"{layer.attention_error:>18.4f}{layer.ffn_error:>12.4f}"
                for index, layer in enumerate(self.plan.layers)
            ]
        if self.save_dir:
            lines += ["", f"  saved to {self.save_dir}"]
        spent = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        lines.append(f"  seconds: {spent}; peak memory {self.peak_memory_bytes / 2**20:,.0f} MiB")
        return "\n".join(lines)


def _names(metrics: dict[str, float]) -> list[str]:
    return [name for name in metrics if not name.endswith("_stderr")]


def _metric_row(name: str, dense: Measured, pruned: Measured | None) -> str:
    def cell(figures: Measured) -> str:
        return f"{figures.metrics[name]:.4f} ±{figures.metrics.get(name + '_stderr', 0.0):.4f}"

    row = f"  {name:22}{cell(dense):>18}"
    if pruned is not None:
        row += f"{cell(pruned):>18}{pruned.metrics[name] - dense.metrics[name]:>+12.4f}"
    return row


def _ratio_row(label: str, before: float, after: float | None, scale: float) -> str:
    row = f"  {label:22}{before / scale:>18,.2f}"
    if after is not None:
        row += f"{after / scale:>18,.2f}{after / before:>11.3f}x"
    return row


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def write_report(run: Run, stem: Path) -> Path:
    """Append a run to ``<stem>.txt`` and to the ``<stem>.jsonl`` beside it.

    Returns:
        The path of the text file.
    """
    append_atomically(stem.with_name(f"{stem.name}.jsonl"), json.dumps(run.to_dict()) + "\n")
    path = stem.with_name(f"{stem.name}.txt")
    append_atomically(path, run.table() + "\n\n")
    return path


def model_card(run_title: str, plan: Plan, source: str) -> str:
    """README.md of a pruned checkpoint."""
    rows = "\n".join(
        f"| {index} | {heads} | {neurons} |"
        for index, (heads, neurons) in enumerate(zip(plan.heads, plan.neurons, strict=True))
    )
    return f"""---
library_name: transformers
tags: [shrinkformer, pruned]
---
# {run_title}

`{source}`, pruned by shrinkformer to {plan.ratio:.4f} of its MACs without retraining
(method `{plan.method}`, mu {plan.mu:g}, seed {plan.seed}; MACs at {plan.sequence_length:.2f} tokens).

```python
import shrinkformer                                # pip install shrinkformer
model = shrinkformer.load("path/to/this/folder")

from transformers import AutoModel                 # or without it: the folder brings its own classes
model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

| layer | heads | neurons |
|---|---|---|
{rows}
"""
