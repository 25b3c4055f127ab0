"""Compare pruning methods on one checkpoint: same calibration examples, same exact MAC budget, several seeds.

python -m benchmarks.compare_methods --model_name ../shared/models/minilm-qqp --task_name qqp --data_dir ../shared/data

prints a Markdown table of the task's main metric, mean and standard deviation over the seeds, and appends one JSON line
for each run to --output, so that an interrupted comparison goes on where it stopped.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import load_model
from shrinkformer.commands.options import EncoderOptions, resolve_device
from shrinkformer.commands.prune_bert import read_job
from shrinkformer.dataset.tasks import get_task
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.methods import METHOD_NAMES
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.resources import Resources
from shrinkformer.utils.files import append_atomically
from shrinkformer.utils.parallel import ALONE

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The finished points of a comparison, one JSON line each; what an interrupted run measured is not lost.

    Attributes:
        path: File of the points.
        rows: Those of earlier runs and of this one.
    """

    path: Path
    rows: list[Record]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What earlier runs left."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return cls(path, [json.loads(line) for line in lines])

    def has(self, key: Record) -> bool:
        """Whether a point was measured."""
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, key: Record, found: Record) -> None:
        """Keep and print a point.

        Args:
            key: What tells it from all others.
            found: What was measured.
        """
        row = {**key, **found}
        append_atomically(self.path, json.dumps(row) + "\n")
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--data_dir", type=Path, default=None)
    parser.add_argument("--bundled_data", action="store_true")
    parser.add_argument("--mu", type=float, nargs="+", default=[0.7, 0.5, 0.4, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHOD_NAMES))
    parser.add_argument("--sample_batch_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("output/compare_methods.jsonl"))
    return parser.parse_args(arguments)


def run_seed(options: argparse.Namespace, seed: int, results: Results) -> None:
    """All methods and budgets on one calibration sample."""
    same = ("model_name", "task_name", "data_dir", "bundled_data", "sample_batch_size", "batch_size")
    settings = EncoderOptions(**{name: getattr(options, name) for name in same}, mu=tuple(options.mu), seed=seed)
    job = read_job(settings, resolve_device(settings.device), ALONE)
    model, _ = load_model(job.source, job.chosen, job.device, job.dtype)
    metric = main_metric(options)

    def key(method: str, mu: float) -> Record:
        common = {"model": job.source.name, "task": job.task_name, "samples": options.sample_batch_size}
        return {**common, "method": method, "mu": mu, "seed": seed}

    if not results.has(key("dense", 1.0)):
        results.add(key("dense", 1.0), {"macs": 1.0, metric: job.evaluate(model, Resources())[metric]})
    for method in options.methods:
        missing = [mu for mu in options.mu if not results.has(key(method, mu))]
        if not missing:
            continue
        calibrated = calibrate(model, job.batches, method=method, seed=seed)
        for mu in missing:
            pruned = calibrated.prune(Budget(mu, job.sequence_length))
            value = job.evaluate(pruned.model, Resources())[metric]
            results.add(key(method, mu), {"macs": pruned.plan.ratio, metric: value})


def main_metric(options: argparse.Namespace) -> str:
    """Name of the task's first metric."""
    return get_task(options.task_name).metrics[0]


def table(rows: list[Record], metric: str, methods: Sequence[str], mus: Sequence[float]) -> str:
    """Mean and standard deviation over seeds as Markdown."""
    lines = [f"| {metric} | " + " | ".join(f"mu {mu:g}" for mu in mus) + " |", "|---" * (len(mus) + 1) + "|"]
    for method in methods:
        cells = []
        for mu in mus:
            values = [row[metric] for row in rows if row["method"] == method and row["mu"] == mu]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    options = parse_arguments()
    quiet_libraries()
    results = Results.read(options.output)
    for seed in options.seeds:
        run_seed(options, seed, results)
    name = Path(options.model_name).resolve().name
    rows = [
        row for row in results.rows if row["task"] == options.task_name and row["model"] in {name, options.model_name}
    ]
    metric = main_metric(options)
    dense = statistics.mean(row[metric] for row in rows if row["method"] == "dense")
    print(f"\ndense {dense:.4f}, {options.sample_batch_size} examples, seeds {options.seeds}\n")
    print(table(rows, metric, options.methods, options.mu))


if __name__ == "__main__":
    main()
