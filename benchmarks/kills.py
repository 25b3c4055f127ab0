"""Kill runs at random moments, take them up with --resume, and compare with runs that nobody disturbed.

OMP_NUM_THREADS=1 python -m benchmarks.kills --work_dir /tmp/kills --kills 200

Pruning and quantizing runs of small models, in memory and block by block, are ended by SIGKILL after a random time,
some of them several times in a row. Counted are: kills; runs that ended as if nothing had happened (every file of every
checkpoint equal to the last bit, the same figures in the report, once for each budget); checkpoints that stood there
after a kill and were not whole; files that were left over in the end.
"""

import argparse
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.small_runs import (
    JOBS,
    Job,
    checkpoints,
    figures,
    finish,
    half_files,
    make_world,
    new_place,
    same,
    start,
)

AGAIN = 0.3
"""Chance that a run that was taken up is killed, too."""

WHOLE, HALF = "whole checkpoints after a kill", "half checkpoints after a kill"
COLUMNS = ("kills", "equal", "different", WHOLE, HALF, "left over")


class Harness:
    """Disturbs one job after the other.

    Args:
        work: Folder for everything.
        generator: Of the moments.
    """

    def __init__(self, work: Path, generator: random.Random) -> None:
        self.work, self.generator = work, generator
        self.world = work / "world"
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def prepare(self) -> None:
        """Models and data."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.world.mkdir(parents=True)

        def work() -> int:
            make_world(self.world)
            return 0

        assert finish(start(self.world, work, self.work / "world.log")) == 0, f"see {self.work / 'world.log'}"

    def undisturbed(self, job: Job) -> tuple[Path, float]:
        """Where a run ended that nobody disturbed, and how long it took."""
        place = new_place(self.world, self.work / "expected")
        began = perf_counter()
        code = self.run(job, place)
        assert code == 0, f"{job.name} ends with {code} undisturbed; see {place / 'log'}"
        return place, perf_counter() - began

    def run(self, job: Job, place: Path, *more: str, seconds: float | None = None) -> int | None:
        """Exit code of a run, or None if it was killed."""
        return finish(start(place, lambda: job.main([*job.arguments, *more]), place / "log"), seconds)

    def disturb(self, job: Job, expected: Path, longest: float) -> None:
        """Kill a run, take it up, perhaps kill it again, until it ends; then compare."""
        place = new_place(self.world, self.work / "disturbed")
        code = self.run(job, place, seconds=self.generator.uniform(0, longest))
        while code is None:
            self.counts[f"{job.name}: kills"] += 1
            self.look_at(job, place, expected)
            limit = self.generator.uniform(0, longest) if self.generator.random() < AGAIN else None
            code = self.run(job, place, "--resume", seconds=limit)
        different = same(checkpoints(place), checkpoints(expected)) or ("" if code == 0 else f"exit code {code}")
        if not different and figures(place) != figures(expected):
            different = "other figures in the report"
        left = half_files(place)
        self.counts[f"{job.name}: {'different' if different else 'equal'}"] += 1
        self.counts[f"{job.name}: left over"] += len(left)
        if different or left:
            self.faults.append(f"{job.name}: {different or left}; {(place / 'log').read_text()[-300:]!r}")

    def look_at(self, job: Job, place: Path, expected: Path) -> None:
        """What stands there right after a kill is whole."""
        wanted = checkpoints(expected)
        for folder, files in checkpoints(place).items():
            whole = not same({folder: files}, {folder: wanted.get(folder, {})})
            self.counts[f"{job.name}: {WHOLE if whole else HALF}"] += 1
            if not whole:
                self.faults.append(f"{job.name}: {folder} is not whole after a kill")
        figures(place)  # raises where a line is torn

    def table(self, jobs: Sequence[Job]) -> str:
        """Counts as Markdown."""
        rows = {job.name: [self.counts[f"{job.name}: {column}"] for column in COLUMNS] for job in jobs}
        rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
        lines = [f"| run | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        return "\n".join([*lines, *(f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows.items())])

    @property
    def kills(self) -> int:
        """How many so far."""
        return sum(count for name, count in self.counts.items() if name.endswith(": kills"))


def parse_arguments(
    arguments: list[str] | None, description: str | None, amount: str, default: int
) -> argparse.Namespace:
    """Flags of benchmarks that disturb runs, which compute with one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a folder of its own: it is emptied")
    parser.add_argument(amount, type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Disturb until there were enough kills; 1 if anything was lost."""
    options = parse_arguments(arguments, __doc__, "--kills", 200)
    harness = Harness(options.work_dir.resolve(), random.Random(options.seed))
    harness.prepare()
    for number, job in enumerate(JOBS):
        expected, longest = harness.undisturbed(job)
        wanted = options.kills * (number + 1) // len(JOBS)
        while harness.kills < wanted:
            harness.disturb(job, expected, longest)
        print(f"{job.name}: {longest:.1f} s undisturbed; {harness.kills} kills so far", flush=True)
    print(f"\n{harness.table(JOBS)}\n")
    print("\n".join(harness.faults) or "nothing was lost")
    return 1 if harness.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
