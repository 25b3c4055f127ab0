"""Pruning and then quantizing a language model, against either alone at about the same size.

python -m benchmarks.equal_bytes --data_dir ../shared/data

prints a Markdown table of what each adds to the logarithm of the perplexity on every corpus, and of the divergence from
the dense model, and appends one JSON line for each run to --output.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.quantization import BATCH, Subject, read_subject
from benchmarks.results import Record, Results, mean_and_spread
from shrinkformer.architectures import layer_views
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.prune_opt import window_batches
from shrinkformer.efficiency.size import count_parameters
from shrinkformer.errors import BudgetError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.pruner import Calibrated, calibrate
from shrinkformer.prune.resume import fingerprint
from shrinkformer.prune.sites import block_sites
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_

SCOPES = ("attention", "ffn")
PRUNED, SMALLER = "pruned, then 4 bits", "pruned alone"
ALONE = {"3 bits": (3, 3), "attention 2 bits, ffn 3 bits": (2, 3), "2 bits": (2, 2)}
"""Bits of both scopes."""

_HALVINGS = 7


def stored_bytes(model: PreTrainedModel, bits: tuple[int, int], group_size: int) -> int:
    """Codes and 16-bit scales of symmetric grids; all else in half precision."""
    total = 16 * count_parameters(model)
    for view in layer_views(model):
        for scope, width in zip(SCOPES, bits, strict=True):
            for path in (path for site in block_sites(view.architecture, scope) for path in site.paths):
                linear = view.linear(path)
                groups = -(-linear.in_features // group_size)
                total += linear.out_features * (linear.in_features * (width - 16) + 16 * groups)
    return int(total // 8)


def quantize(
    model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, bits: tuple[int, int], group_size: int
) -> PreTrainedModel:
    """Quantize in place: in one go, or one scope after the other where they differ."""
    scopes = {"all": bits[0]} if bits[0] == bits[1] else dict(zip(SCOPES, bits, strict=True))
    for scope, width in scopes.items():
        quantize_(model, window_batches(ids, BATCH), QuantizeConfig(width, group_size, layers=scope), dense=dense)
    return model


def prune_to_size(calibrated: Calibrated, length: int, wanted: int) -> PreTrainedModel:
    """About the largest pruned model that is no larger in half precision, or the smallest that there is."""
    low, high, fitting, least = 0.0, 1.0, None, None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        try:
            model = calibrated.prune(Budget(middle, length)).model
        except BudgetError:
            low = middle
            continue
        if 2 * count_parameters(model) > wanted:
            high, least = middle, model
        else:
            low, fitting = middle, model
    found = fitting or least
    assert found is not None, "no budget was met"
    return found


def run_seed(subject: Subject, options: argparse.Namespace, seed: int, results: Results) -> None:
    """All points on one calibration sample."""
    ids, group = subject.calibrate(seed), options.group_size
    calibrated = calibrate(subject.model, window_batches(ids, BATCH), method=options.method, seed=seed)
    pruned = calibrated.prune(Budget(options.mu, subject.length, group)).model
    wanted = stored_bytes(pruned, (4, 4), group)

    def alone(bits: tuple[int, int]) -> Callable[[], PreTrainedModel]:
        return lambda: quantize(copy.deepcopy(subject.model), copy.deepcopy(subject.model), ids, bits, group)

    points: dict[str, tuple[Callable[[], PreTrainedModel], tuple[int, int]]] = {
        PRUNED: (lambda: quantize(pruned, subject.model, ids, (4, 4), group), (4, 4)),
        SMALLER: (lambda: prune_to_size(calibrated, subject.length, wanted), (16, 16)),
        **{name: (alone(bits), bits) for name, bits in ALONE.items()},
    }
    for name, (make, bits) in points.items():
        key = {**common(subject, options), "point": name, "seed": seed}
        if not results.has(key):
            model = make()
            size = 2 * count_parameters(model) if name == SMALLER else stored_bytes(model, bits, group)
            results.add(key, {**subject.judge(model), "bytes": size})


def common(subject: Subject, options: argparse.Namespace) -> Record:
    """What all points of one comparison share."""
    names = ("mu", "group_size", "method", "sample_batch_size", "max_windows")
    return {"weights": fingerprint(subject.model)[:12], **{name: getattr(options, name) for name in names}}


def table(rows: Sequence[Record], corpora: Sequence[str]) -> str:
    """Means and standard deviations over seeds, as Markdown."""
    lines = ["| | MB | " + " | ".join(f"rise, {name}" for name in corpora) + " | KL |"]
    lines.append("|---" * (len(corpora) + 3) + "|")
    for name in (PRUNED, SMALLER, *ALONE):
        found = [row for row in rows if row["point"] == name]
        if found:
            cells = [mean_and_spread([row[column] for row in found]) for column in (*corpora, "kl")]
            size = sum(row["bytes"] for row in found) / len(found) / 1e6
            lines.append(f"| {name} | {size:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-mini")
    parser.add_argument("--models_dir", type=Path, default=Path("../shared/models"))
    parser.add_argument("--data_dir", type=Path, default=None)
    parser.add_argument("--mu", type=float, default=0.7)
    parser.add_argument("--method", default="stat")
    parser.add_argument("--group_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sample_batch_size", type=int, default=128, help="calibration windows")
    parser.add_argument("--evaluation_size", type=int, default=256, help="sequences of a model's own text")
    parser.add_argument("--max_windows", type=int, default=None, help="evaluate only the first of each corpus")
    parser.add_argument("--output", type=Path, default=Path("output/equal_bytes.jsonl"))
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is missing, then print the table."""
    options = parse_arguments()
    quiet_libraries()
    results, subject = Results.read(options.output), read_subject(options.model, options)
    for seed in options.seeds:
        run_seed(subject, options, seed, results)
    rows = [row for row in results.rows if common(subject, options).items() <= row.items()]
    print(f"\n{options.model}, mu {options.mu:g}, groups of {options.group_size}; {len(options.seeds)} seeds\n")
    print(table(rows, list(subject.evaluation)))


if __name__ == "__main__":
    main()
