"""Compare pruning methods on a language model: same calibration windows, same exact MAC budget, several seeds.

python -m benchmarks.compare_decoders --data_dir ../shared/data

prints Markdown tables of the perplexity on every corpus and of the divergence from the dense model's next-token
distributions, mean and standard deviation over the seeds, and appends one JSON line for each run to --output, so that
an interrupted comparison goes on where it stopped.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.results import Record, Results, mean_and_spread
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import find_decoder, load_model, model_class
from shrinkformer.commands.options import BUNDLED_DECODER, DecoderOptions, resolve_device
from shrinkformer.commands.prune_opt import read_calibration, read_evaluation, window_batches, window_length
from shrinkformer.commands.tokenizers import load_tokenizer
from shrinkformer.dataset.corpus import CORPORA
from shrinkformer.evaluate.perplexity import evaluate_perplexity
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.divergence import Target, predictions
from shrinkformer.prune.names import METHOD_NAMES
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.resume import fingerprint
from shrinkformer.prune.shrink_config import ShrinkConfig

DIVERGENCE_WINDOWS = 20
"""Of each corpus; a divergence has a far smaller standard error than a perplexity."""


@dataclass(frozen=True)
class Comparison:
    """One dense model and the texts that all methods are judged on.

    Attributes:
        model: The dense model, on its device.
        evaluation: Windows of token ids by corpus, ``(windows, length)`` each.
        batch_size: Windows per forward pass.
        key: What tells this comparison from others in the same file.
        results: Where the points go.
        look_at: What is recorded of every pruned model beside its perplexities.
        uniform: All blocks get the same sizes; points are filed under the method's name and this.
        config: Choices of ``shrink``.
    """

    model: PreTrainedModel
    evaluation: Mapping[str, Tensor]
    batch_size: int
    key: Record
    results: Results
    look_at: Callable[[Pruned], Record]
    uniform: bool = False
    config: ShrinkConfig = ShrinkConfig()

    def label(self, method: str) -> str:
        """Of a method, in the file of points and in tables."""
        return f"{method}, uniform" if self.uniform else method

    def measure(self, model: PreTrainedModel) -> Record:
        """Perplexity and divergence by corpus."""
        device = self.model.device
        perplexities = {
            name: evaluate_perplexity(model, windows, batch_size=self.batch_size, device=device).value
            for name, windows in self.evaluation.items()
        }
        return {**perplexities, **{f"kl {name}": self.divergence(model, name) for name in self.evaluation}}

    @torch.no_grad()
    def divergence(self, model: PreTrainedModel, corpus: str) -> float:
        """Mean Kullback-Leibler divergence per token from what the dense model predicts, in nats."""
        total, tokens = 0.0, 0
        for ids in torch.split(self.evaluation[corpus][:DIVERGENCE_WINDOWS], self.batch_size):
            moved = ids.to(self.model.device)
            mask = torch.ones_like(moved, dtype=torch.bool)
            dense, other = (predictions(each(input_ids=moved, use_cache=False), mask) for each in (self.model, model))
            total, tokens = total + float(Target(dense).divergence(other)), tokens + ids.numel()
        return total / tokens

    def run_dense(self) -> None:
        """Measure the dense model, which depends on no seed."""
        key = {**self.key, "method": "dense", "mu": 1.0}
        if not self.results.has(key):
            self.results.add(key, {"macs": 1.0, **self.measure(self.model)})

    def run_method(self, method: str, seed: int, mus: Sequence[float], calibration: Tensor) -> None:
        """Calibrate once and measure what is missing of all budgets.

        Args:
            method: Name of the method.
            seed: Of the calibration windows and of random methods.
            mus: Budgets.
            calibration: Windows of token ids, ``(windows, length)``.
        """
        keys = {mu: {**self.key, "method": self.label(method), "mu": mu, "seed": seed} for mu in mus}
        missing = [mu for mu in mus if not self.results.has(keys[mu])]
        if not missing:
            return
        batches = window_batches(calibration, self.batch_size)
        calibrated = calibrate(self.model, batches, method=method, seed=seed, config=self.config)
        for mu in missing:
            pruned = calibrated.prune(Budget(mu, calibration.shape[1], uniform=self.uniform))
            found = {"macs": pruned.plan.ratio, **self.measure(pruned.model), **self.look_at(pruned)}
            self.results.add(keys[mu], found)

    def table(self, methods: Sequence[str], mus: Sequence[float], seeds: Sequence[int]) -> str:
        """Mean and standard deviation over seeds as Markdown: the dense model, then every method at every budget."""
        return "\n\n".join(
            self._table(names, decimals, methods, mus, seeds)
            for names, decimals in ((list(self.evaluation), 2), ([f"kl {name}" for name in self.evaluation], 4))
        )

    def _table(
        self, names: Sequence[str], decimals: int, methods: Sequence[str], mus: Sequence[float], seeds: Sequence[int]
    ) -> str:
        rows = [row for row in self.results.rows if self.key.items() <= row.items()]
        lines = ["| method | mu | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
        points = [("dense", 1.0), *((self.label(method), mu) for method in methods for mu in mus)]
        for method, mu in points:
            found = [row for row in rows if (row["method"], row["mu"]) == (method, mu)]
            found = [row for row in found if row.get("seed") in (None, *seeds)]  # the dense model has none
            cells = [mean_and_spread([row[name] for row in found], decimals=decimals) for name in names]
            lines.append(f"| {method} | {mu:g} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser, *, mu: Sequence[float], output: str) -> None:
    """Flags that all comparisons of language models share.

    Args:
        parser: Where they are added.
        mu: Default budgets.
        output: Default name of the file of points.
    """
    parser.add_argument("--mu", type=float, nargs="+", default=list(mu))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHOD_NAMES), choices=list(METHOD_NAMES))
    parser.add_argument("--sample_batch_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--uniform", action="store_true", help="all blocks get the same sizes")
    parser.add_argument("--search_seconds", type=float, default=ShrinkConfig().search_seconds)
    parser.add_argument("--output", type=Path, default=Path("output") / output)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default=BUNDLED_DECODER)
    parser.add_argument("--task", default="wikitext2", choices=list(CORPORA), help="corpus to calibrate on")
    parser.add_argument("--data_dir", type=Path, default=None)
    parser.add_argument("--bundled_data", action="store_true")
    parser.add_argument("--max_windows", type=int, default=None, help="evaluate only the first of each corpus")
    parser.add_argument("--device", default="auto")
    add_arguments(parser, mu=[0.8, 0.7, 0.6, 0.5], output="compare_decoders.jsonl")
    return parser.parse_args(arguments)


def sizes(pruned: Pruned) -> Record:
    """Heads and neurons of every block."""
    return {"heads": pruned.plan.heads, "neurons": pruned.plan.neurons}


def prepare(options: argparse.Namespace) -> tuple[Comparison, DecoderOptions, Any]:
    """The comparison, the options of ``prune_opt.py`` that say the same, and the tokenizer."""
    same = ("model_name", "data_dir", "bundled_data", "sample_batch_size", "batch_size", "device")
    shared = {name: getattr(options, name) for name in same}
    settings = DecoderOptions(**shared, task_name=options.task, mu=tuple(options.mu))
    source = find_decoder(settings.model_name, settings.task_name)
    tokenizer = load_tokenizer(source)
    length = window_length(settings, source, tokenizer)
    evaluation = read_evaluation(settings, tokenizer, length, settings.bundled_data)
    evaluation = {name: windows[: options.max_windows] for name, windows in evaluation.items()}
    model, _ = load_model(source, model_class(source, None), resolve_device(settings.device), torch.float32)
    key = {
        "model": source.name,
        "weights": fingerprint(model)[:12],  # a checkpoint that was trained further is another one
        "task": settings.task_name,
        "samples": settings.sample_batch_size,
        "windows": [len(windows) for windows in evaluation.values()],
        "length": length,
    }
    results = Results.read(options.output)
    config = ShrinkConfig(search_seconds=options.search_seconds)
    comparison = Comparison(model, evaluation, settings.batch_size, key, results, sizes, options.uniform, config)
    return comparison, settings, tokenizer


def main() -> None:
    """Run what is missing, then print the table."""
    options = parse_arguments()
    quiet_libraries()
    comparison, settings, tokenizer = prepare(options)
    length = comparison.key["length"]
    comparison.run_dense()
    for seed in options.seeds:
        calibration = read_calibration(replace(settings, seed=seed), tokenizer, length, settings.bundled_data)
        for method in options.methods:
            comparison.run_method(method, seed, options.mu, calibration)
    counts = ", ".join(f"{len(windows)} of {name}" for name, windows in comparison.evaluation.items())
    print(f"\n{settings.model_name}: perplexity; windows of {length} tokens: {counts}")
    print(f"calibrated on {settings.sample_batch_size} windows of {settings.task_name}, seeds {options.seeds}\n")
    print(comparison.table(options.methods, options.mu, options.seeds))


if __name__ == "__main__":
    main()
