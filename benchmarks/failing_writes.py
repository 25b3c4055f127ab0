"""Let writes fail in the middle of runs, and look at what stands there afterwards.

OMP_NUM_THREADS=1 python -m benchmarks.failing_writes --work_dir /tmp/failing --runs 100

Two faults take turns: a disk that is full after a random number of bytes (a small tmpfs; only root may mount one), and
files that cannot grow beyond a random size (RLIMIT_FSIZE). An earlier checkpoint lies where the new one goes.
Afterwards every checkpoint must be whole, the earlier or the new one; everything that a report calls saved must be
there as an undisturbed run would have written it; and with room again, --resume must end as if nothing had happened.
"""

import contextlib
import math
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kills import Harness, parse_arguments
from benchmarks.small_runs import JOBS, Job, checkpoints, figures, finish, new_place, records, same, start

SMALLEST = 16_384
"""Bytes: what a run prints needs room, too."""

COLUMNS = (
    "runs",
    "failed writes",
    "whole checkpoints",
    "half checkpoints",
    "reported and there",
    "reported and not there",
    "resumed, equal",
    "resumed, different",
    "tracebacks",
)


@dataclass(frozen=True)
class Fault:
    """What a run with a fault left.

    Attributes:
        place: Its folder.
        before: The checkpoints that were there.
        log: What it said.
        code: How it ended.
    """

    place: Path
    before: dict[str, dict[str, str]]
    log: str
    code: int | None


class FailingWrites(Harness):
    """Lets writes of one job after the other fail."""

    def earlier(self, job: Job) -> Path:
        """Where a run with another seed ended: what stands there when the next one begins."""
        place = new_place(self.world, self.work / "earlier")
        assert self.run(job, place, "--seed", "7") == 0
        return place

    def fail(self, job: Job, expected: Path, earlier: Path, *, disk: bool) -> None:
        """One run with a fault, one with room again."""
        whole = sum(file.stat().st_size for file in (expected / "output").rglob("*") if file.is_file())
        limit = int(math.exp(self.generator.uniform(math.log(SMALLEST), math.log(2 * whole))))
        with small_disk(self.work / "place", limit if disk else 0) as (folder, grow):
            place = new_place(self.world, folder / "here")
            if disk and limit < 1.2 * whole:  # no room for the earlier checkpoint
                (place / "output").mkdir()
            else:
                shutil.copytree(earlier / "output", place / "output")
            before = checkpoints(place)
            log = self.work / "fault.log"
            log.unlink(missing_ok=True)
            code = finish(start(place, lambda: _limited(job, 0 if disk else limit), log))
            self.counts["runs"] += 1
            self.counts["failed writes"] += code == 1
            self.judge(job, expected, Fault(place, before, log.read_text(), code))
            grow()
            again = self.run(job, place, *(["--resume"] if code else []))
            found = {name: files for name, files in checkpoints(place).items() if name in checkpoints(expected)}
            equal = again == 0 and not same(found, checkpoints(expected))
            self.counts["resumed, equal" if equal else "resumed, different"] += bool(code)
            if not equal:
                self.faults.append(f"{job.name}: {again}, {same(found, checkpoints(expected))}, {_end(place / 'log')}")

    def judge(self, job: Job, expected: Path, fault: Fault) -> None:
        """What stands there after a fault."""
        wanted, there = checkpoints(expected), checkpoints(fault.place)
        for folder, files in there.items():
            whole = files in (fault.before.get(folder), wanted.get(folder))
            self.counts["whole checkpoints" if whole else "half checkpoints"] += 1
            if not whole:
                self.faults.append(f"{job.name}: {folder} is not whole; {fault.log[-300:]!r}")
        for record in records(fault.place):
            if record["seed"] == 0 and record.get("save_dir"):
                right = there.get(record["save_dir"]) == wanted[record["save_dir"]]
                self.counts["reported and there" if right else "reported and not there"] += 1
                if not right:
                    self.faults.append(f"{job.name}: {record['save_dir']} is reported and not there")
        figures(fault.place)  # raises where a line is torn
        last = (fault.log.strip().splitlines() or [""])[-1]
        if "Traceback" in fault.log or fault.code not in (0, 1) or (fault.code == 1 and ": error: " not in last):
            self.counts["tracebacks"] += 1
            self.faults.append(f"{job.name}: exit code {fault.code}, {fault.log[-500:]!r}")


def _limited(job: Job, limit: int) -> int:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return job.main(job.arguments)


def _end(log: Path) -> str:
    return repr(log.read_text()[-300:]) if log.exists() else ""


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder on a disk of so many bytes, or of any size for 0, and a function that makes room."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)

    if not size:
        yield folder, lambda: None
        return
    mount(f"size={size}")
    try:
        yield folder, lambda: mount("remount,size=1g")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether small disks can be made here."""
    try:
        with small_disk(folder, SMALLEST):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


def main(arguments: list[str] | None = None) -> int:
    """Let writes fail so often; 1 if anything was lost."""
    options = parse_arguments(arguments, __doc__, "--runs", 100)
    harness = FailingWrites(options.work_dir.resolve(), random.Random(options.seed))
    harness.prepare()
    disks = can_mount(harness.work / "place")
    print("full disks and short files take turns" if disks else "no disk can be mounted here: short files alone")
    for number, job in enumerate(JOBS):
        expected, _ = harness.undisturbed(job)
        earlier = harness.earlier(job)
        while harness.counts["runs"] < options.runs * (number + 1) // len(JOBS):
            harness.fail(job, expected, earlier, disk=disks and harness.counts["runs"] % 2 == 0)
        print(f"{job.name}: {harness.counts['runs']} runs so far", flush=True)
    print("\n| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    print("| " + " | ".join(str(harness.counts[column]) for column in COLUMNS) + " |\n")
    print("\n".join(harness.faults) or "nothing was lost")
    return 1 if harness.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
