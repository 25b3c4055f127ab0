r"""Sizes and bits chosen for a number of bytes, against every pair of mu and bits that fills the same bytes.

python -m benchmarks.target_ratio --model_name ../shared/models/minilm-qqp --task_name qqp --data_dir ../shared/data
python -m benchmarks.target_ratio --model_name opt-mini --data_dir ../shared/data

A pair quantizes all blocks, embeddings and head to its bits, with position embeddings and without, and prunes (method
shrink) to the largest mu whose file is small enough. Both sides search for as long, and write embeddings that are the
head as well only once.
Prints a Markdown table of the divergence from the dense model on the evaluation set and of the bytes on disk, and
appends one JSON line for each run to --output.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from transformers import PreTrainedModel

from benchmarks.encoders import Case, read_encoder
from benchmarks.quantization import BATCH, read_subject
from benchmarks.results import Record, Results, mean_and_spread
from shrinkformer.architectures import layer_views
from shrinkformer.commands.console import quiet_libraries, say
from shrinkformer.commands.prune_opt import window_batches
from shrinkformer.commands.pruning import round_weights
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.efficiency.size import folder_bytes
from shrinkformer.errors import BudgetError
from shrinkformer.prune.budget import Budget, CostModel
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.search import Search
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.sites import OUTSIDE, POSITIONS
from shrinkformer.quantize.byte_budget import Compressor, learn_bytes
from shrinkformer.quantize.byte_costs import ATTENTION, FLOAT
from shrinkformer.quantize.checkpoint import save
from shrinkformer.quantize.config import QuantizeConfig, Quantized
from shrinkformer.quantize.drafts import Choice
from shrinkformer.quantize.outside import outside_layers
from shrinkformer.quantize.quantizer import quantize_

CHOSEN, WITH_POSITIONS = "target_ratio", ", positions too"

_HALVINGS, _LESS = 8, 0.98


def read_decoder(options: argparse.Namespace, seed: int) -> Case:
    """A language model and the three corpora."""
    subject = read_subject(options.model_name, options)
    batches = window_batches(subject.calibrate(seed), BATCH)
    return Case(subject.model, folder_bytes(subject.folder), batches, subject.length, subject.judge)


def run_seed(options: argparse.Namespace, seed: int, results: Results) -> None:
    """All ratios and pairs on one calibration sample."""

    def key(point: str, ratio: float) -> Record:
        return {**common(options), "ratio": ratio, "point": point, "seed": seed}

    names = points(options)
    missing = [(name, ratio) for ratio in options.ratios for name in names if not results.has(key(name, ratio))]
    if not missing:
        return
    case = (read_encoder if options.task_name else read_decoder)(options, seed)
    config = QuantizeConfig(group_size=options.group_size, scale_dtype=torch.float16)
    compressor = learn_bytes(
        case.model,
        case.batches,
        config,
        Budget(1.0, case.length, 32),
        ShrinkConfig(search_seconds=options.search_seconds, say=say),
        seed=seed,
    )
    for name, ratio in missing:
        began, allowed = perf_counter(), int(ratio * case.bytes)
        try:
            if name == CHOSEN:
                made = compressor.best(compressor.plans(allowed))
                model, found, pruned = made.model, made.quantized, made.pruned
            else:
                model, found, pruned = by_hand(compressor, name, allowed, options.search_seconds)
        except BudgetError as error:
            results.add(key(name, ratio), {"kl": float("inf"), "bytes": 0, "mu": 0.0, "why": str(error)})
            continue
        seconds = perf_counter() - began
        size = stored(model, found, pruned)
        assert size <= allowed, f"{name}: {size} bytes, {allowed} were allowed"
        mu = 1.0 if pruned is None else pruned.plan.ratio
        results.add(key(name, ratio), {"bytes": size, "mu": mu, "seconds": round(seconds), **case.judge(model)})


def points(options: argparse.Namespace) -> list[str]:
    """Names of what is compared."""
    return [CHOSEN, *(f"{bits} bits{more}" for bits in options.bits for more in ("", WITH_POSITIONS))]


def by_hand(
    compressor: Compressor, point: str, allowed: int, seconds: float
) -> tuple[PreTrainedModel, Quantized, Pruned | None]:
    """The largest model that fits with everything in so many bits.

    Raises:
        BudgetError: There is none.
    """
    shrinker, limits = compressor.shrinker, compressor.limits
    options, bits = compressor.searches[0].options, int(point.split(maxsplit=1)[0])
    also = tuple(kind for kind in OUTSIDE if kind != POSITIONS or point.endswith(WITH_POSITIONS))
    outside = {name for kind in also for name in outside_layers(shrinker.model, kind)}
    also = tuple(kind for kind in also if outside_layers(shrinker.model, kind))

    def sizes_of(mu: float, seconds: float) -> list[LayerSize]:
        costs = CostModel.of(layer_views(shrinker.model), replace(limits, mu=mu))
        return Search(shrinker.levels, shrinker.curves, shrinker.damage, costs, seconds=seconds).run().sizes

    def fits(sizes: Sequence[LayerSize]) -> bool:
        state = {}
        for part in options.parts:
            if part.names:
                state[part] = Choice(0, (bits if part.names[0] in outside else FLOAT, FLOAT))
            else:
                size = sizes[part.index]
                state[part] = Choice(size.heads if part.sublayer == ATTENTION else size.neurons, (bits, bits))
        return options.total(state) <= allowed

    mu, sizes = 1.0, [level.size for level in shrinker.levels]
    if not fits(sizes):
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            try:
                fit = fits(sizes_of(middle, 0))
            except BudgetError:
                fit = True
            low, high = (middle, high) if fit else (low, middle)
        mu = low
        while not fits(sizes := sizes_of(mu, seconds)):
            mu *= _LESS
    pruned = None if mu == 1 else shrinker.prune_to(sizes, limits.sequence_length)
    model = copy.deepcopy(shrinker.model if pruned is None else pruned.model)
    config = replace(compressor.config, bits=bits, also=also)
    return model, quantize_(model, shrinker.batches, config, dense=None if mu == 1 else shrinker.model), pruned


def stored(model: PreTrainedModel, found: Quantized, pruned: Pruned | None) -> int:
    """Bytes on disk; what is not quantized becomes what the file holds."""
    round_weights(model, torch.float16, but={f"{name}.weight" for name in found.weights})
    plan = None if pruned is None else pruned.plan
    if plan is not None:
        describe_sizes(model, plan)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "saved"
        return folder_bytes(save(model, found.weights, folder, dtype=torch.float16, plan=plan, tied_once=True))


def common(options: argparse.Namespace) -> Record:
    """What all points of one comparison share."""
    names = ("group_size", "search_seconds", "sample_batch_size", "max_windows")
    model = Path(options.model_name).resolve().name
    return {"model": model, "task": options.task_name, **{name: getattr(options, name) for name in names}}


def table(rows: Sequence[Record], options: argparse.Namespace) -> str:
    """Divergence, with its spread over seeds, share of the MACs and bytes, as Markdown."""
    lines = ["| ratio | | mu | MB | KL |", "|---|---|---|---|---|"]
    for ratio in options.ratios:
        for name in points(options):
            found = [row for row in rows if (row["ratio"], row["point"]) == (ratio, name)]
            if not found:
                continue
            if any(row["bytes"] == 0 for row in found):
                lines.append(f"| {ratio:g} | {name} | none fits | | |")
                continue
            mu, size = (sum(row[column] for row in found) / len(found) for column in ("mu", "bytes"))
            divergence = mean_and_spread([row["kl"] for row in found], 5)
            lines.append(f"| {ratio:g} | {name} | {mu:.3f} | {size / 1e6:.3f} | {divergence} |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--task_name", default="", help="of an encoder; a language model has none")
    parser.add_argument("--data_dir", type=Path, default=None)
    parser.add_argument("--models_dir", type=Path, default=Path("../shared/models"))
    parser.add_argument("--bundled_data", action="store_true")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.12])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--search_seconds", type=float, default=ShrinkConfig().search_seconds)
    parser.add_argument("--sample_batch_size", type=int, default=512, help="calibration examples or windows")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--evaluation_size", type=int, default=256, help="sequences of a model's own text")
    parser.add_argument("--max_windows", type=int, default=None, help="evaluate only the first of each corpus")
    parser.add_argument("--output", type=Path, default=Path("output/target_ratio.jsonl"))
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is missing, then print the table."""
    options = parse_arguments()
    quiet_libraries()
    results = Results.read(options.output)
    for seed in options.seeds:
        run_seed(options, seed, results)
    rows = [row for row in results.rows if common(options).items() <= row.items() and row["seed"] in options.seeds]
    print(f"\n{common(options)['model']}, groups of {options.group_size}, seeds {options.seeds}\n")
    print(table(rows, options))


if __name__ == "__main__":
    main()
