"""Properties of plans, budgets and checkpoints on random models; every failure is printed as its smallest example.

    python -m benchmarks.fuzz --examples 20000                            # about an hour on one core
    python -m benchmarks.fuzz --examples 200 --families llama phi --properties budgets --seed 7
    python -m benchmarks.fuzz --examples 20000 --chunk 1000 --results build/fuzz.jsonl   # can be stopped and continued

`plans`: any sizes of any blocks -> surgery -> save -> load: same logits, MACs and parameters as counted.
`budgets`: any budget, method and calibration sample: within the budget or rightly refused, then the same.
`sizes`: allocation of budgets against brute force. `texts`: what is read as a plan.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_checks import check_budget, check_plan
from benchmarks.fuzz_models import FAMILIES
from benchmarks.fuzz_sizes import check_sizes
from benchmarks.fuzz_texts import check_plan_text
from shrinkformer.prune.cholesky import DampingWarning

Check = Callable[[st.DataObject, str], str]

PROPERTIES: dict[str, Check] = {
    "plans": check_plan,
    "budgets": check_budget,
    "sizes": check_sizes,
    "texts": check_plan_text,
}

SHARES = {"plans": 0.9, "budgets": 0.1}
"""Of the examples that are asked for; as many again of each property that needs no model come extra, and are quick."""


def fuzz(name: str, family: str, examples: int, seed: int) -> Counter[str]:
    """Try a property on one family.

    Args:
        name: Of the property.
        family: Of the models.
        examples: How many are tried.
        seed: Of the examples.

    Returns:
        How often each outcome occurred.

    Raises:
        Exception: What the smallest failing example raises; notes say what was drawn.
    """
    counts: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(st.data())
    def every_example(data: st.DataObject) -> None:
        counts[PROPERTIES[name](data, family)] += 1

    every_example()
    return counts


def _attempt(name: str, family: str, examples: int, seed: int) -> dict[str, object]:
    """One line of the results."""
    began, failure = time.perf_counter(), ""
    counts: Counter[str] = Counter()
    try:
        counts = fuzz(name, family, examples, seed)
    except Exception as error:  # whatever it is, the next family shall be tried
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}: {place.line}"
        failure = "\n".join([f"{type(error).__name__}: {error}", where, *getattr(error, "__notes__", [])])
        print(f"\n{name} {family} seed {seed}:\n{failure}\n", flush=True)
    return {
        "property": name,
        "family": family,
        "seed": seed,
        "asked": examples,
        "examples": sum(counts.values()),
        "outcomes": dict(counts),
        "seconds": round(time.perf_counter() - began, 1),
        "failure": failure,
    }


def _summarise(lines: Sequence[dict[str, object]], families: Sequence[str], names: Sequence[str]) -> None:
    """A table of examples by family and property."""
    width = max(map(len, families))
    print(" " * width, *(f"{name:>9}" for name in names))
    totals: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for family in families:
        counts: Counter[str] = Counter()
        for line in lines:
            if line["family"] == family:
                counts[str(line["property"])] += int(str(line["examples"]))
                outcomes.update({f"{line['property']}, {key}": n for key, n in dict(line["outcomes"]).items()})  # type: ignore[call-overload]
        totals.update(counts)
        print(f"{family:{width}}", *(f"{counts[name]:9}" for name in names))
    print(f"{'all':{width}}", *(f"{totals[name]:9}" for name in names))
    print("\n".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items())))
    through_files = totals["plans"] + totals["budgets"]
    print(
        f"{through_files} models through plan, surgery, save and load",
        f"{sum(bool(line['failure']) for line in lines)} failures",
        sep="; ",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the properties, and say what was tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1200, help="models in all")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--properties", nargs="+", choices=PROPERTIES, default=list(PROPERTIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=1000, help="models for each seed; then the next seed's turn comes")
    parser.add_argument("--results", type=Path, help="JSON lines; what they hold is not tried again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", DampingWarning)
    old = options.results.read_text().splitlines() if options.results and options.results.exists() else []
    lines = [json.loads(line) for line in old]
    tried = {(line["property"], line["family"], line["seed"], line["asked"]) for line in lines}
    for number in range(-(-options.examples // options.chunk)):
        share = min(options.chunk, options.examples - number * options.chunk) / len(options.families)
        for family in options.families:
            for name in options.properties:
                if name not in SHARES and family != options.families[0]:
                    continue  # no model is made, so one family stands for all
                point = (
                    name,
                    family,
                    options.seed + number,
                    max(1, round(share * SHARES.get(name, len(options.families)))),
                )
                if point in tried:
                    continue
                lines.append(_attempt(name, family, point[3], point[2]))
                if options.results:
                    with options.results.open("a") as file:
                        file.write(json.dumps(lines[-1]) + "\n")
        print(f"seed {options.seed + number}: done", flush=True)
    _summarise(lines, options.families, options.properties)
    return int(any(line["failure"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
