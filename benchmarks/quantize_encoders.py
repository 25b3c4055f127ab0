r"""Encoders at 8, 4, 2 and 1 bits, attention alone and all linear layers, without training.

python -m benchmarks.quantize_encoders --model_name ../shared/models/minilm-qqp --task_name qqp \
    --data_dir ../shared/data

prints a Markdown table of the task's main metric, and appends one JSON line for each run to --output.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

from benchmarks.encoders import encoder_options
from benchmarks.results import Record, Results, mean_and_spread
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import load_model
from shrinkformer.commands.options import resolve_device
from shrinkformer.commands.prune_bert import read_job
from shrinkformer.dataset.tasks import get_task
from shrinkformer.prune.resources import Resources
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.utils.parallel import ALONE


def run_seed(options: argparse.Namespace, seed: int, results: Results) -> None:
    """All bits, layers and quantizers on one calibration sample."""
    settings = encoder_options(options, seed)
    job = read_job(settings, resolve_device(settings.device), ALONE)
    dense, _ = load_model(job.source, job.chosen, job.device, job.dtype)
    metric = get_task(options.task_name).metrics[0]
    common = {"model": job.source.name, "task": options.task_name, "samples": options.sample_batch_size}
    common |= {"group_size": options.group_size, "seed": seed}
    key = {**common, "bits": 32, "layers": "none", "quantizer": "none"}
    if not results.has(key):
        results.add(key, {metric: job.evaluate(dense, Resources()).metrics[metric]})
    for quantizer in options.quantizers:
        for layers in options.layers:
            for bits in options.bits:
                key = {**common, "bits": bits, "layers": layers, "quantizer": quantizer}
                if not results.has(key):
                    model = copy.deepcopy(dense)
                    config = QuantizeConfig(bits, options.group_size, quantizer=quantizer, layers=layers)
                    found = quantize_(model, job.batches, config)
                    value = job.evaluate(model, Resources()).metrics[metric]
                    results.add(key, {metric: value, "seconds": round(found.seconds["quantization"], 1)})


def table(rows: Sequence[Record], metric: str, options: argparse.Namespace) -> str:
    """Means and standard deviations over seeds, as Markdown."""
    lines = [f"| {metric} | " + " | ".join(f"{bits} bits" for bits in options.bits) + " |"]
    lines.append("|---" * (len(options.bits) + 1) + "|")
    for quantizer in options.quantizers:
        for layers in options.layers:
            chosen = {"quantizer": quantizer, "layers": layers}.items()
            cells = []
            for bits in options.bits:
                values = [row[metric] for row in rows if chosen <= row.items() and row["bits"] == bits]
                cells.append(mean_and_spread(values))
            lines.append(f"| {quantizer}, {layers} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--data_dir", type=Path, default=None)
    parser.add_argument("--bundled_data", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2, 1])
    parser.add_argument("--layers", nargs="+", default=["attention", "all"])
    parser.add_argument("--quantizers", nargs="+", default=["shrink", "gptq"])
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sample_batch_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("output/quantize_encoders.jsonl"))
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is missing, then print the table."""
    options = parse_arguments()
    quiet_libraries()
    results = Results.read(options.output)
    for seed in options.seeds:
        run_seed(options, seed, results)
    name = Path(options.model_name).resolve().name
    shared = {"task": options.task_name, "group_size": options.group_size, "samples": options.sample_batch_size}
    rows = results.of(options.model_name, shared)
    metric = get_task(options.task_name).metrics[0]
    dense = mean_and_spread([row[metric] for row in rows if row["bits"] == 32])
    print(f"\n{name}, groups of {options.group_size}, {len(options.seeds)} seeds; dense {dense}\n")
    print(table(rows, metric, options))


if __name__ == "__main__":
    main()
