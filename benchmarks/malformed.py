"""Give damaged and hostile inputs to every command, and count how each one ends.

    python -m benchmarks.malformed [--kind config] [--seed 0]

Each case runs in a process of its own, with limits on memory and time, in a folder with a copy of a tiny valid
checkpoint and data of which one thing was changed. Right is: exit code 2 or 1, one line on standard error, no
traceback, nothing executed that came with the input, and no file changed but below ``output``. A change that makes no
difference is counted as accepted, with the reason, and is none of the malformed inputs.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.malformed_cases import all_cases
from benchmarks.malformed_runner import GIB, Case, Ending, run_all

_HEADS = (
    *("input", "cases", "exit 2", "exit 1", "accepted", "unforeseen", "tracebacks", "not one line"),
    *("killed", "code run", "files touched", "seconds", "GiB"),
)


def table(endings: Sequence[Ending]) -> str:
    """Counts by kind of input."""
    heads: tuple[str, ...] = (
        "input",
        "cases",
        "exit 2",
        "exit 1",
        "accepted",
        "unforeseen",
        "tracebacks",
        "not one line",
    )
    heads += ("killed", "code run", "files touched", "seconds", "GiB")
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    kinds = [*dict.fromkeys(ending.case.kind for ending in endings), "all"]
    for kind in kinds:
        own = [ending for ending in endings if kind in {"all", ending.case.kind}]
        refused = [ending for ending in own if not ending.accepted]
        counts = [
            len(own),
            sum(ending.code == 2 for ending in refused),
            sum(ending.code == 1 for ending in refused),
            len(own) - len(refused),
            sum(ending.unforeseen for ending in own),
            sum(ending.traceback for ending in own),
            sum(not ending.one_line for ending in refused),
            sum(ending.killed for ending in own),
            sum(ending.executed for ending in own),
            sum(bool(ending.touched) for ending in own),
        ]
        longest, largest = (
            max((ending.seconds for ending in own), default=0.0),
            max((ending.memory for ending in own), default=0) / GIB,
        )
        lines.append(" | ".join([kind, *map(str, counts), f"{longest:.1f}", f"{largest:.2f}"]))
    return "\n".join(f"| {line} |" for line in lines)


def describe(ending: Ending) -> str:
    """A case that did not end as it should, for people."""
    case = ending.case
    return (
        f"{case.kind}: {case.name} [{case.command} on {case.base}] ended with {ending.code}"
        f"{', code was run' if ending.executed else ''}{', touched ' if ending.touched else ''}"
        f"{' '.join(ending.touched[:3])}"
        f": {ending.said.strip()[-600:]}"
    )


def main() -> None:
    """Print the table, what was accepted and why, and what went wrong."""
    parser = argparse.ArgumentParser(description="Damaged and hostile inputs for every command, and how they end.")
    parser.add_argument("--seed", type=int, default=0, help="of the generators")
    parser.add_argument("--kind", help="only kinds of input with this in their names")
    parser.add_argument("--show", action="store_true", help="print what every case said")
    flags = parser.parse_args()

    def choose(bases: Path) -> list[Case]:
        return [case for case in all_cases(bases, flags.seed) if (flags.kind or "") in case.kind]

    def tell(ending: Ending) -> None:
        if flags.show:
            case = f"{ending.case.name} [{ending.case.command} on {ending.case.base}]"
            print(f"{ending.code:3} {ending.seconds:5.1f} s  {case}: {ending.said.strip()[:400]}", flush=True)

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="malformed-") as folder:
        endings = run_all(choose, Path(folder), tell)
    print(table(endings))
    refused = [ending for ending in endings if not ending.accepted]
    hand = sum(ending.case.kind.startswith("by hand") for ending in refused)
    print(
        f"\n{len(refused)} malformed inputs, {hand} of them written by hand; {time.perf_counter() - began:.0f} seconds"
    )
    print("\naccepted:")
    for ending in endings:
        if ending.accepted and ending.case.kind != "valid":
            print(f"  {ending.case.name} [{ending.case.command} on {ending.case.base}]: {ending.case.reason}")
    wrong = [ending for ending in endings if not ending.right]
    print(f"\nnot as it should be: {len(wrong)}")
    for ending in wrong:
        print(f"  {describe(ending)}")


if __name__ == "__main__":
    main()
