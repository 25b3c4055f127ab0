"""Compare pruning methods on one checkpoint: same calibration examples, same exact MAC budget, several seeds.

python -m benchmarks.compare_methods --model_name ../shared/models/minilm-qqp --task_name qqp --data_dir ../shared/data

prints a Markdown table of the task's main metric, mean and standard deviation over the seeds, and appends one JSON line
for each run to --output, so that an interrupted comparison goes on where it stopped.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import load_model
from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.prune_bert import Inputs, make_budgets, read_inputs
from shrinkformer.dataset.encoding import padded_batches
from shrinkformer.evaluate.evaluation import evaluate_model
from shrinkformer.prune.methods import METHODS
from shrinkformer.prune.pruner import calibrate
from shrinkformer.utils.files import append_atomically

Record = dict[str, Any]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--data_dir", type=Path, default=None)
    parser.add_argument("--bundled_data", action="store_true")
    parser.add_argument("--mu", type=float, nargs="+", default=[0.7, 0.5, 0.4, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sample_batch_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("output/compare_methods.jsonl"))
    return parser.parse_args(arguments)


def score(model: Any, inputs: Inputs, batch_size: int) -> float:
    """The task's main metric."""
    evaluation = evaluate_model(model, inputs.tokenizer, inputs.task, inputs.evaluation, batch_size=batch_size)
    return evaluation.metrics[inputs.task.metrics[0]]


def run_seed(options: argparse.Namespace, seed: int, done: list[Record]) -> None:
    """All methods and budgets on one calibration sample."""
    common = {name: getattr(options, name) for name in ("model_name", "task_name", "data_dir", "bundled_data")}
    settings = PruneOptions(**common, mu=tuple(options.mu), seed=seed, sample_batch_size=options.sample_batch_size)
    inputs = read_inputs(settings)
    model = load_model(inputs.source, inputs.task, inputs.device)
    features = inputs.calibration.features
    batches = [batch for _, batch in padded_batches(features, inputs.tokenizer, options.batch_size)]

    def record(method: str, mu: float, ratio: float, value: float) -> None:
        key = {"model": inputs.source.name, "task": inputs.task.name, "samples": options.sample_batch_size}
        row = {**key, "method": method, "mu": mu, "seed": seed, "macs": ratio, inputs.task.metrics[0]: value}
        append_atomically(options.output, json.dumps(row) + "\n")
        done.append(row)
        print(json.dumps(row), flush=True)

    def is_done(method: str, mu: float) -> bool:
        wanted = (inputs.source.name, inputs.task.name, options.sample_batch_size, method, mu, seed)
        return any(
            tuple(row[name] for name in ("model", "task", "samples", "method", "mu", "seed")) == wanted for row in done
        )

    if not is_done("dense", 1.0):
        record("dense", 1.0, 1.0, score(model, inputs, options.batch_size))
    for method in options.methods:
        missing = [budget for budget in make_budgets(settings, inputs.mean_length) if not is_done(method, budget.mu)]
        if not missing:
            continue
        calibrated = calibrate(model, batches, method=method, seed=seed)
        for budget in missing:
            pruned = calibrated.prune(budget)
            record(method, budget.mu, pruned.plan.ratio, score(pruned.model, inputs, options.batch_size))


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
    done: list[Record] = []
    if options.output.exists():
        done = [json.loads(line) for line in options.output.read_text().splitlines()]
    for seed in options.seeds:
        run_seed(options, seed, done)
    name = Path(options.model_name).resolve().name
    rows = [row for row in done if row["task"] == options.task_name and row["model"] in {name, options.model_name}]
    metric = list(rows[0])[-1]
    dense = statistics.mean(row[metric] for row in rows if row["method"] == "dense")
    print(f"\ndense {dense:.4f}, {options.sample_batch_size} examples, seeds {options.seeds}\n")
    print(table(rows, metric, options.methods, options.mu))


if __name__ == "__main__":
    main()
