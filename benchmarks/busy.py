"""How much a process computes beside others that want the same cores, by threads and by how these wait for each other.

    python -m benchmarks.busy
    python -m benchmarks.busy --others 2 --seconds 10 --repeats 3

starts processes that do nothing but take a core each, then one at a time workers that multiply small matrices, as
pruning does, for so many seconds. Spinning is what torch's OpenMP does by default, sleeping is what the commands set.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from shrinkformer.pictures.columns import aligned
from shrinkformer.utils.threads import wait_passively

_OTHER = "while True: pass"
_SETTINGS = (("spin", 2), ("sleep", 2), ("spin", 1))

_WORKER = """
import sys, time
import torch
seconds, threads = float(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
left, right = torch.randn(512, 384), torch.randn(384, 1536)
left @ right
end, steps = time.perf_counter() + seconds, 0
while time.perf_counter() < end:
    for _ in range(4):
        torch.nn.functional.gelu(left @ right)
    steps += 1
print(steps)
"""


@contextmanager
def taken(count: int) -> Iterator[None]:
    """So many processes that take a core each."""
    others = [subprocess.Popen([sys.executable, "-c", _OTHER]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def steps(waiting: str, threads: int, seconds: float) -> int:
    """Steps of one worker, each of four products of 512 x 384 with 384 x 1536.

    Args:
        waiting: ``spin`` or ``sleep``.
        threads: Of the worker.
        seconds: On the clock.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP", "KMP"))}
    if waiting == "sleep":
        wait_passively(environment)
    command = [sys.executable, "-c", _WORKER, str(seconds), str(threads)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 2], help="processes that take a core each")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each worker")
    parser.add_argument("--repeats", type=int, default=3, help="workers of each kind, in turns; the median is shown")
    options = parser.parse_args()
    rows = [["threads", "waiting", *(f"{count} others" for count in options.others)]]
    found: dict[tuple[tuple[str, int], int], list[int]] = {}
    for count in options.others:
        with taken(count):
            for _ in range(options.repeats):
                for setting in _SETTINGS:
                    found.setdefault((setting, count), []).append(steps(*setting, options.seconds))
    for setting in _SETTINGS:
        waiting, threads = setting
        counts = [f"{median(found[setting, count]):.0f}" for count in options.others]
        rows.append([str(threads), waiting if threads > 1 else "", *counts])
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
