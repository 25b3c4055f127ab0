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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax

from benchmarks.results import Record, Results, mean_and_spread
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import find_model, load_model, load_tokenizer, model_class
from shrinkformer.commands.options import EncoderOptions
from shrinkformer.commands.prune_bert import read_data
from shrinkformer.dataset.encoding import padded_batches
from shrinkformer.dataset.tasks import get_task
from shrinkformer.evaluate.evaluation import Evaluation, evaluate_model
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.methods import METHOD_NAMES
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.shrink import ShrinkConfig


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
    parser.add_argument("--search_seconds", type=float, default=ShrinkConfig().search_seconds)
    parser.add_argument("--output", type=Path, default=Path("output/pruning.jsonl"))
    parser.add_argument("--figure", type=Path, default=None, help="PNG to draw (needs matplotlib)")
    return parser.parse_args()


def encoder_options(options: argparse.Namespace, seed: int) -> EncoderOptions:
    """What the commands for encoders take of a comparison's flags."""
    same = ("model_name", "task_name", "data_dir", "bundled_data", "sample_batch_size", "batch_size")
    return EncoderOptions(**{name: getattr(options, name) for name in same}, seed=seed)


def run_seed(options: argparse.Namespace, seed: int, results: Results, variants: Mapping[str, Variant]) -> None:
    """All methods and budgets on one calibration sample."""
    settings = encoder_options(options, seed)
    task = get_task(settings.task_name)
    source = find_model(settings.model_name, task)
    tokenizer = load_tokenizer(source)
    calibration, splits = read_data(settings, task, source, tokenizer)
    batches = [batch for _, batch in padded_batches(calibration.features, tokenizer, settings.batch_size)]
    lengths = [length for split in splits.values() for length in split.lengths]
    model, _ = load_model(source, model_class(source, task), "cpu", torch.float32)

    def key(method: str, mu: float) -> Record:
        common = {"model": source.name, "task": task.name, "samples": options.sample_batch_size}
        return {**common, "method": method, "mu": mu, "seed": seed}

    def judge(judged: Any) -> Evaluation:
        return evaluate_model(judged, tokenizer, task, splits, batch_size=settings.batch_size, keep_logits=True)

    missing = [(name, mu) for name in options.methods for mu in options.mu if not results.has(key(name, mu))]
    if not missing:
        return
    dense = judge(model)
    if not results.has(key("dense", 1.0)):
        results.add(key("dense", 1.0), {"macs": 1.0, **figures(dense, dense, task.metrics[0])})
    for method in dict.fromkeys(name for name, _ in missing):
        variant = variants[method]
        searches = variant.config.search_seconds > 0
        config = replace(variant.config, search_seconds=options.search_seconds) if searches else variant.config
        with variant.patch():
            calibrated = calibrate(model, batches, method=variant.method, seed=seed, config=config)
            for mu in (mu for name, mu in missing if name == method):
                began = perf_counter()
                pruned = calibrated.prune(Budget(mu, sum(lengths) / len(lengths)))
                seconds = perf_counter() - began + sum(calibrated.seconds.values())
                found = figures(judge(pruned.model), dense, task.metrics[0])
                results.add(key(method, mu), {"macs": pruned.plan.ratio, **found, "seconds": round(seconds, 1)})


def figures(found: Evaluation, dense: Evaluation, metric: str) -> Record:
    """Main metric and divergence with their standard errors."""
    assert found.logits is not None
    assert dense.logits is not None
    rows = np.concatenate([divergences(dense.logits[split], found.logits[split]) for split in dense.logits])
    error = f"{metric}_stderr"
    return {
        metric: found.metrics[metric],
        error: found.metrics[error],
        "kl": float(rows.mean()),
        "kl_stderr": float(rows.std() / len(rows) ** 0.5),
    }


def divergences(dense: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence for each example, of answers from both ends; half squared distances of numbers."""
    ours, theirs = (np.asarray(logits, dtype=np.float64) for logits in (dense, other))
    if ours.shape[1] == 1:  # scores, or cosines of sentence pairs
        distances: NDArray[np.float64] = np.square(ours - theirs).reshape(-1) / 2
        return distances
    hidden = np.isnan(ours)  # behind the end of a window
    ours, theirs = (log_softmax(np.where(hidden, -1e4, logits), axis=1) for logits in (ours, theirs))
    rows: NDArray[np.float64] = (np.exp(ours) * (ours - theirs)).reshape(len(ours), ours.shape[1], -1).sum(axis=(1, 2))
    return rows


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
    """The metric over the fraction of MACs, a curve for each method."""
    from matplotlib import pyplot  # only for those who want a picture

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for method in options.methods:
        points = {mu: [row[metric] for row in rows if (row["method"], row["mu"]) == (method, mu)] for mu in options.mu}
        means = {mu: statistics.mean(values) for mu, values in points.items() if values}
        axes.plot(list(means), list(means.values()), marker="o", markersize=3, label=method)
    dense = statistics.mean(row[metric] for row in rows if row["method"] == "dense")
    axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
    axes.set(xlabel="fraction of MACs", ylabel=f"{options.task_name} {metric}")
    axes.legend(fontsize=8)
    figure.savefig(options.figure, dpi=120)


def compare(variants: Mapping[str, Variant], description: str | None) -> None:
    """Run what is missing, then print the tables."""
    options = parse_arguments(list(variants), description)
    quiet_libraries()
    results = Results.read(options.output)
    for seed in options.seeds:
        run_seed(options, seed, results, variants)
    rows = results.of(options.model_name, {"task": options.task_name, "samples": options.sample_batch_size})
    metric = get_task(options.task_name).metrics[0]
    dense = [row for row in rows if row["method"] == "dense"]
    print(
        f"\ndense {statistics.mean(row[metric] for row in dense):.4f} (standard error of one evaluation "
        f"{dense[0][f'{metric}_stderr']:.4f}), {options.sample_batch_size} examples, seeds {options.seeds}\n"
    )
    print(table(rows, metric, options) + "\n\n" + table(rows, "kl", options))
    if options.figure is not None:
        draw(rows, metric, options)


if __name__ == "__main__":
    compare(VARIANTS, __doc__)
