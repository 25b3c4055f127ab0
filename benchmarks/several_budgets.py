"""What several budgets in one run cost, against one budget: wall time of the whole command, evaluation taken off.

python -m benchmarks.several_budgets --model_name ../shared/models/minilm-qqp --task_name qqp --data_dir ../shared/data
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

SHARED = ("loading", "calibration", "selection")
OWN = ("allocation", "refit", "saving")


def run(arguments: list[str], mus: list[float]) -> tuple[float, float, dict[str, float]]:
    """One command; returns seconds without evaluation, of the whole process and of our own steps, and the steps."""
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        # The dense model alone, mu 1, comes last: its evaluation time tells the others' share.
        budgets = [f"{mu:g}" for mu in (*mus, 1.0)]
        command = [sys.executable, "prune_bert.py", *arguments, "--mu", *budgets, "--output_dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = perf_counter() - start
        (report,) = Path(folder).glob("*/*.jsonl")  # what lies deeper is for --resume
        records: list[dict[str, Any]] = [json.loads(line) for line in report.read_text().splitlines()]
    *pruned, dense = (record["seconds"] for record in records)
    evaluation = dense["evaluation"] + sum(seconds["evaluation"] - dense["evaluation"] for seconds in pruned)
    steps = {name: pruned[0][name] for name in SHARED} | {name: sum(s[name] for s in pruned) for name in OWN}
    return wall - evaluation, sum(steps.values()), steps


def main() -> None:
    """Alternate the two commands and print their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mu", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--one", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=2)
    options, rest = parser.parse_known_args()
    for _ in range(options.repeats):
        one, several = run(rest, [options.one]), run(rest, options.mu)
        for name, (process, own, steps) in (("one budget", one), (f"{len(options.mu)} budgets", several)):
            shown = ", ".join(f"{step} {seconds:.1f}" for step, seconds in steps.items())
            print(f"{name:12} process {process:6.1f} s, own steps {own:6.1f} s ({shown})")
        print(f"{'ratio':12} process {several[0] / one[0]:6.2f}  , own steps {several[1] / one[1]:6.2f}\n", flush=True)


if __name__ == "__main__":
    main()
