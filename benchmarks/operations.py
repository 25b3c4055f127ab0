"""Where a forward pass in eager torch spends its time, operation by operation, for models side by side.

python -m benchmarks.operations all-MiniLM-L6-v2 output/all-MiniLM-L6-v2/similarity-mu0.5 --threads 1
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from shrinkformer.commands.locate import class_of, find_any, load_model
from shrinkformer.efficiency.latency import random_batch

Times = dict[tuple[str, int], float]
"""Milliseconds of the n-th call of an operation, without what it calls."""


def profiled(model: Any, batch: Mapping[str, torch.Tensor]) -> Times:
    """One forward pass under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(**batch)
    calls: Counter[str] = Counter()
    times: Times = {}
    for event in seen.events() or ():
        times[event.name, calls[event.name]] = event.self_cpu_time_total / 1000
        calls[event.name] += 1
    return times


def fastest(models: Mapping[str, Any], batch: Mapping[str, torch.Tensor], repeats: int) -> dict[str, Counter[str]]:
    """Milliseconds of every operation: for each of its calls the fastest run, which is the least disturbed one."""
    best: dict[str, Times] = {name: {} for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(**batch)
        for _ in range(repeats):
            for name, model in models.items():
                for call, time in profiled(model, batch).items():
                    best[name][call] = min(time, best[name].get(call, time))
    totals: dict[str, Counter[str]] = {name: Counter() for name in models}
    for name, times in best.items():
        for (operation, _), time in times.items():
            totals[name][operation] += time  # type: ignore[assignment]
    return totals


def main() -> None:
    """Print a Markdown table; the last rows are the rest and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names or folders; shares are of the first")
    parser.add_argument("--shape", type=int, nargs=2, default=[8, 128], help="examples and tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--rows", type=int, default=9, help="operations to show")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sources = [find_any(name, "models") for name in options.models]
    models = {one.name: load_model(one, class_of(one), "cpu", torch.float32)[0] for one in sources}
    vocabulary = min(one.config.vocab_size for one in sources)
    shape = (options.shape[0], options.shape[1])
    batch = random_batch(shape, vocabulary, torch.Generator().manual_seed(0), torch.device("cpu"))
    totals = fastest(models, batch, options.repeats)
    first = next(iter(totals.values()))
    shown = [operation for operation, _ in first.most_common(options.rows)]
    rows = {operation: [total[operation] for total in totals.values()] for operation in shown}
    rows["everything else"] = [total.total() - sum(total[name] for name in shown) for total in totals.values()]
    rows["sum"] = [total.total() for total in totals.values()]
    print(f"| ms | {' | '.join(totals)} |\n| --- |{' ---: |' * len(totals)}")
    for name, values in rows.items():
        cells = [f"{value:.2f} ({value / values[0]:.2f})" for value in values]
        print(f"| {name.removeprefix('aten::')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
