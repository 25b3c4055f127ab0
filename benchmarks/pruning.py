"""Compare pruning methods on one encoder: same calibration examples, same exact MAC budgets, several seeds.

python -m benchmarks.pruning --model_name ../shared/models/minilm-qqp --task_name qqp --data_dir ../shared/data

prints Markdown tables of the task's main metric and of the divergence from the dense model on the evaluation set, mean
and standard deviation over the seeds, and appends one JSON line for each run to --output, so that an interrupted
comparison goes on where it stopped. With --figure, draws the metric over the MACs.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from benchmarks.encoders import read_encoder
from benchmarks.results import Record, Results, mean_and_spread
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import find_model
from shrinkformer.dataset.tasks import get_task
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.names import METHOD_NAMES
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.shrink_config import ShrinkConfig


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        method: Name of the pruning method.
        config: Choices of ``shrink`` beside the time of its search.
        patch: What is changed in the method while it runs.
    """

    method: str
    config: ShrinkConfig = ShrinkConfig()
    patch: Callable[[], AbstractContextManager[object]] = nullcontext


VARIANTS = {name: Variant(name) for name in METHOD_NAMES}
VARIANTS["shrink-whole-heads"] = Variant("shrink", ShrinkConfig(whole_heads=True))


def parse_arguments(variants: Sequence[str], description: str | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--data_dir", type=Path, default=None)
    parser.add_argument("--bundled_data", action="store_true")
    parser.add_argument("--mu", type=float, nargs="+", default=[0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=variants, choices=variants, metavar="METHOD")
    parser.add_argument("--sample_batch_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--evaluation_examples", type=int, default=None, help="only so many, taken from everywhere")
    parser.add_argument("--search_seconds", type=float, default=ShrinkConfig().search_seconds)
    parser.add_argument("--output", type=Path, default=Path("output/pruning.jsonl"))
    parser.add_argument("--figure", type=Path, default=None, help="PNG to draw (needs matplotlib)")
    return parser.parse_args()


def shared(options: argparse.Namespace) -> Record:
    """What all points of a comparison have in common."""
    evaluated = options.evaluation_examples or "all"
    return {"task": options.task_name, "samples": options.sample_batch_size, "evaluated": evaluated}


def run_seed(options: argparse.Namespace, seed: int, results: Results, variants: Mapping[str, Variant]) -> None:
    """All methods and budgets on one calibration sample."""

    def key(method: str, mu: float) -> Record:
        return {"model": name, **shared(options), "method": method, "mu": mu, "seed": seed}

    name = find_model(options.model_name, get_task(options.task_name)).name

    missing = [(row, mu) for row in options.methods for mu in options.mu if not results.has(key(row, mu))]
    if not missing:
        return
    encoder = read_encoder(options, seed)
    if not results.has(key("dense", 1.0)):
        results.add(key("dense", 1.0), {"macs": 1.0, **encoder.dense})
    for method in dict.fromkeys(row for row, _ in missing):
        variant = variants[method]
        searches = variant.config.search_seconds > 0
        config = replace(variant.config, search_seconds=options.search_seconds) if searches else variant.config
        with variant.patch():
            calibrated = calibrate(encoder.model, encoder.batches, method=variant.method, seed=seed, config=config)
            for mu in (mu for row, mu in missing if row == method):
                began = perf_counter()
                pruned = calibrated.prune(Budget(mu, encoder.length))
                seconds = perf_counter() - began + sum(calibrated.seconds.values())
                found = {"macs": pruned.plan.ratio, **encoder.judge(pruned.model), "seconds": round(seconds, 1)}
                results.add(key(method, mu), found)


def table(rows: list[Record], column: str, options: argparse.Namespace) -> str:
    """Mean and standard deviation over seeds as Markdown."""
    lines = [f"| {column} | " + " | ".join(f"mu {mu:g}" for mu in options.mu) + " |"]
    lines.append("|---" * (len(options.mu) + 1) + "|")
    for method in options.methods:
        cells = [
            mean_and_spread([row[column] for row in rows if row["method"] == method and row["mu"] == mu])
            for mu in options.mu
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[Record], metric: str, options: argparse.Namespace) -> None:
    """The metric and the divergence over the fraction of MACs, a curve for each method."""
    from matplotlib import pyplot  # only for those who want a picture

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, column in zip(panels, (metric, "kl"), strict=True):
        for method in options.methods:
            found = {
                mu: [row[column] for row in rows if (row["method"], row["mu"]) == (method, mu)] for mu in options.mu
            }
            means = {mu: statistics.mean(values) for mu, values in found.items() if values}
            axes.plot(list(means), list(means.values()), marker="o", markersize=3, label=method)
        axes.set_xlabel("fraction of MACs")
    dense = statistics.mean(row[metric] for row in rows if row["method"] == "dense")
    panels[0].axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
    panels[0].set_ylabel(f"{options.task_name} {metric}")
    panels[1].set(ylabel="divergence from the dense model", yscale="log")
    panels[0].legend(fontsize=8)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=100)


def compare(variants: Mapping[str, Variant], description: str | None) -> None:
    """Run what is missing, then print the tables."""
    options = parse_arguments(list(variants), description)
    quiet_libraries()
    results = Results.read(options.output)
    for seed in options.seeds:
        run_seed(options, seed, results, variants)
    rows = results.of(options.model_name, shared(options))
    metric = get_task(options.task_name).metrics[0]
    dense = [row for row in rows if row["method"] == "dense"]
    print(
        f"\ndense {statistics.mean(row[metric] for row in dense):.4f} (standard error of one evaluation "
        f"{dense[0][f'{metric}_stderr']:.4f}), {options.sample_batch_size} examples, seeds {options.seeds}\n"
    )
    print(table(rows, metric, options) + "\n\n" + table(rows, "kl", options))
    if options.figure is not None:
        draw(rows, metric, options)


def main() -> None:
    """Run what is missing, then print the tables."""
    compare(VARIANTS, __doc__)


if __name__ == "__main__":
    main()
