"""How long it takes until something happens: imports, help, wrong flags, dry runs.

python -m benchmarks.startup
python -m benchmarks.startup --tree path/to/another/clone

Seconds of processor time and, in brackets, of the clock; smallest of some runs, so that files are in memory.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = {
    "`import torch`": ["-c", "import torch"],
    "`from transformers import PreTrainedModel`": ["-c", "from transformers import PreTrainedModel"],
    "`import shrinkformer.api`": ["-c", "import shrinkformer.api"],
    "`shrinkformer prune --help`": ["-m", "shrinkformer", "prune", "--help"],
    "`shrinkformer prune --mu 7`": ["-m", "shrinkformer", "prune", "--mu", "7"],
    "`shrinkformer prune --task wikitext2 --bundled_data --dry_run`": [
        *("-m", "shrinkformer", "prune", "--task", "wikitext2", "--bundled_data", "--dry_run"),
    ],
}
"""What Python is given, by what it is called in the table."""


def measure(arguments: list[str], tree: Path, repeats: int) -> tuple[float, float]:
    """Smallest processor time and smallest time of the clock of some runs, in seconds."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    found = []
    for _ in range(repeats):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, check=False)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter() - start
        found.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall))
    return min(cpu for cpu, _ in found), min(wall for _, wall in found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="source tree to measure (default: this one)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command (default: 3)")
    options = parser.parse_args()
    print("| command | seconds |\n|---|---|")
    for name, arguments in COMMANDS.items():
        cpu, wall = measure(arguments, options.tree.resolve(), options.repeats)
        print(f"| {name} | {cpu:.1f} ({wall:.1f}) |", flush=True)


if __name__ == "__main__":
    main()
