"""Compare quantizers of weights: same calibration windows, same bits and groups, other libraries beside our own.

python -m benchmarks.quantization --peers_dir ../peers --data_dir ../shared/data --models_dir ../shared/models

(benchmarks/peers/install.sh makes --peers_dir) prints Markdown tables of what quantization adds to the logarithm of the
perplexity on every corpus, of the Kullback-Leibler divergence from the dense model, size, time and peak memory, and
appends one JSON line for each run to --output, so that an interrupted comparison goes on where it stopped.
"""

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.compare_llamas import CORPUS, EVALUATION_SEED, require_disjoint, write_text
from benchmarks.peers.runner import PEERS, PeerError, run_peer
from benchmarks.results import Record, Results, mean_and_spread
from shrinkformer.architectures import layer_views
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.prune_opt import window_batches
from shrinkformer.dataset.corpora import calibration_windows, evaluation_windows
from shrinkformer.dataset.corpus import CORPORA
from shrinkformer.evaluate.perplexity import evaluate_perplexity
from shrinkformer.prune.resume import fingerprint
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_

OURS = ("shrink", "shrink-asym", "gptq", "rtn")
SYMMETRIC = dict.fromkeys(OURS, False) | {"shrink": True}  # gptq and rtn as their authors run them

BUNDLED = Path("models")
LENGTH = 512
BATCH = 8
KL_WINDOWS = 20


@dataclass(frozen=True)
class Subject:
    """A dense model, the texts that its quantized versions are judged on, and those that they are calibrated on.

    Attributes:
        name: What tables call it.
        folder: Where it is.
        model: The model.
        evaluation: Windows of token ids by corpus, ``(windows, length)`` each.
        calibrate: Gives the calibration windows of a seed.
        dense: Negative log-likelihood per token by corpus.
        predictions: Log-probabilities of the first windows by corpus, by batch, in half precision.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    evaluation: Mapping[str, Tensor]
    calibrate: Callable[[int], Tensor]
    dense: dict[str, float] = field(default_factory=dict)
    predictions: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Of a window, in tokens."""
        return next(iter(self.evaluation.values())).shape[1]

    def likelihoods(self, model: PreTrainedModel) -> dict[str, float]:
        """Negative log-likelihood per token by corpus, in nats."""
        return {
            name: evaluate_perplexity(model, windows, batch_size=BATCH).nll for name, windows in self.evaluation.items()
        }

    @torch.no_grad()
    def divergence(self, model: PreTrainedModel) -> float:
        """Kullback-Leibler divergence of a model from the dense one, mean over the tokens of all corpora."""
        total, tokens = 0.0, 0
        for name, windows in self.evaluation.items():
            parts = torch.split(windows[:KL_WINDOWS], BATCH)
            if name not in self.predictions:
                self.predictions[name] = [_log_probabilities(self.model, ids).half() for ids in parts]
            for ids, half in zip(parts, self.predictions[name], strict=True):
                p = half.float()
                total += float((p.exp() * (p - _log_probabilities(model, ids))).sum(dtype=torch.float64))
                tokens += ids.numel()
        return total / tokens

    def judge(self, model: PreTrainedModel) -> Record:
        """What a quantized model lost: rise of the log-perplexity by corpus, and the divergence."""
        if not self.dense:
            self.dense.update(self.likelihoods(self.model))
        found = self.likelihoods(model)
        return {**{name: found[name] - self.dense[name] for name in found}, "kl": self.divergence(model)}


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return torch.log_softmax(logits.float(), -1)


def read_subject(name: str, options: argparse.Namespace) -> Subject:
    """A model with a tokenizer and the three corpora; one without, and text that it writes itself.

    Windows are as long as the model takes, at most :data:`LENGTH` tokens.
    """
    folder = BUNDLED / name if (BUNDLED / name).exists() else options.models_dir / name
    folder = folder / "hf_converted" if (folder / "hf_converted").exists() else folder
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if not (folder / "tokenizer_config.json").exists():
        evaluation = write_text(model, options.evaluation_size, EVALUATION_SEED)

        def write(seed: int) -> Tensor:
            calibration = write_text(model, options.sample_batch_size, seed)
            require_disjoint(calibration, evaluation)
            return calibration

        return Subject(name, folder, model, {CORPUS: evaluation[: options.max_windows]}, write)
    tokenizer, length = AutoTokenizer.from_pretrained(folder), min(LENGTH, model.config.max_position_embeddings)
    texts = {
        corpus: evaluation_windows(source, tokenizer, length=length, data_dir=options.data_dir)[: options.max_windows]
        for corpus, source in CORPORA.items()
    }

    def draw(seed: int) -> Tensor:
        samples, source = options.sample_batch_size, CORPORA["wikitext2"]
        return calibration_windows(source, tokenizer, length=length, size=samples, seed=seed, data_dir=options.data_dir)

    return Subject(name, folder, model, texts, draw)


def quantize_ours(model: PreTrainedModel, ids: Tensor, quantizer: str, bits: int, group_size: int) -> None:
    """Quantize a model in place with one of this package's quantizers.

    Args:
        model: Changed.
        ids: Calibration windows, ``(windows, length)``.
        quantizer: One of :data:`OURS`.
        bits: Of a code.
        group_size: Inputs that share a scale; -1 for one scale per output.
    """
    name = quantizer.removesuffix("-asym")
    config = QuantizeConfig(bits=bits, group_size=group_size, symmetric=SYMMETRIC[quantizer], quantizer=name)
    quantize_(model, window_batches(ids, BATCH), config)


def run_quantizer(
    subject: Subject, quantizer: str, ids: Tensor, *, bits: int, group_size: int, peers_dir: Path
) -> tuple[PreTrainedModel, Record]:
    """A quantized copy of a model, and what it took.

    Raises:
        PeerError: A peer is not installed, or failed.
    """
    model = copy.deepcopy(subject.model)
    if quantizer in OURS:
        start = time.perf_counter()
        quantize_ours(model, ids, quantizer, bits, group_size)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of everything that this process did so far
    else:
        peer = PEERS[quantizer]
        weights, seconds, peak = run_peer(
            peer, peer.python(peers_dir), subject.folder, ids, bits=bits, group_size=group_size
        )
        replace_weights(model, weights, quantizer)
    symmetric = SYMMETRIC[quantizer] if quantizer in OURS else PEERS[quantizer].symmetric
    size = stored_bytes(model, bits, group_size, symmetric)
    return model, {"bytes": size, "seconds": round(seconds, 2), "peak_memory_bytes": peak}


def replace_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], quantizer: str) -> None:
    """Put a peer's weights into a model.

    Raises:
        PeerError: The weights of a layer of a block are missing, or some are of no layer.
    """
    found = model.load_state_dict(weights, strict=False)
    missing = {f"{name}.weight" for name, layer in model.named_modules() if layer in _layers(model)} - set(weights)
    if missing or found.unexpected_keys:
        raise PeerError(f"{quantizer} left out: no weights for {sorted(missing)[:3]}, or {found.unexpected_keys[:3]}")


def _layers(model: PreTrainedModel) -> set[nn.Linear]:
    """The layers that are quantized: all linear ones of the blocks."""
    return {layer for view in layer_views(model) for layer in view.block.modules() if isinstance(layer, nn.Linear)}


def stored_bytes(model: PreTrainedModel, bits: int, group_size: int, symmetric: bool) -> int:
    """Size of a quantized model: codes, scales of 16 bits and zero points; all else in half precision."""
    layers = _layers(model)
    total: int = 16 * sum(parameter.numel() for parameter in model.parameters())
    for layer in layers:
        groups = 1 if group_size == -1 else -(-layer.in_features // group_size)
        row = layer.in_features * (bits - 16) + groups * (16 if symmetric else 16 + bits)
        total += layer.out_features * row
    return total // 8


def compare(subject: Subject, options: argparse.Namespace, results: Results) -> Record:
    """Measure what is missing of one model, and say how its rows are told from others."""
    common = {
        "model": subject.name,
        "weights": fingerprint(subject.model)[:12],
        "samples": options.sample_batch_size,
        "windows": [len(windows) for windows in subject.evaluation.values()],
    }
    left_out: set[tuple[str, int]] = set()
    for seed in options.seeds:
        ids = subject.calibrate(seed)
        for bits, group_size in ((bits, group) for bits in options.bits for group in options.group_size):
            for quantizer in (*options.quantizers, *options.peers):
                key = {**common, "bits": bits, "group_size": group_size, "quantizer": quantizer, "seed": seed}
                if results.has(key) or (quantizer, group_size) in left_out:
                    continue
                try:
                    model, cost = run_quantizer(
                        subject, quantizer, ids, bits=bits, group_size=group_size, peers_dir=options.peers_dir
                    )
                except PeerError as error:
                    left_out.add((quantizer, group_size))
                    print(f"{subject.name}, groups of {group_size}: {error}", flush=True)
                    continue
                results.add(key, {**subject.judge(model), **cost})
    return common


def table(rows: Sequence[Record], corpora: Sequence[str], quantizers: Sequence[str]) -> str:
    """Means and standard deviations over seeds, as Markdown, and how ``shrink`` compares with the best peer.

    Args:
        rows: Points of one model, number of bits and group size.
        corpora: Names of the corpora.
        quantizers: In the order of the lines.
    """
    columns = [*corpora, "kl"]
    heads = ["quantizer", *(f"rise, {name}" for name in corpora), "KL", "MB", "seconds", "peak MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    means = {}
    for quantizer in quantizers:
        found = [row for row in rows if row["quantizer"] == quantizer]
        if found:
            means[quantizer] = {name: statistics.mean(row[name] for row in found) for name in columns}
            cells = [mean_and_spread([row[name] for row in found]) for name in columns]
            size, seconds, peak = (
                statistics.mean(row[name] for row in found) for name in ("bytes", "seconds", "peak_memory_bytes")
            )
            cells += [f"{size / 1e6:.2f}", f"{seconds:.1f}", f"{peak / 1e6:.0f}"]
            lines.append(f"| {quantizer} | " + " | ".join(cells) + " |")
    rivals = {
        "best peer": [name for name in means if name in PEERS and not PEERS[name].gradient],
        "best peer that trains": [name for name in means if name in PEERS and PEERS[name].gradient],
        "gptq": [name for name in means if name == "gptq"],
    }
    for label, names in rivals.items():
        for ours in (name for name in ("shrink", "shrink-asym") if name in means and names):
            best = {column: min(means[name][column] for name in names) for column in columns}
            ratios = [f"{means[ours][name] / best[name]:.3f}" for name in columns]
            lines.append(f"| {ours} / {label} | " + " | ".join(ratios) + " | | | |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers_dir", type=Path, default=Path("../peers"))
    parser.add_argument("--data_dir", type=Path, default=None)
    parser.add_argument("--models_dir", type=Path, default=Path("../shared/models"))
    parser.add_argument("--models", nargs="+", default=["opt-mini", "babyllama-tok105", "stories260K"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group_size", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quantizers", nargs="*", default=list(OURS), choices=OURS)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--sample_batch_size", type=int, default=128, help="calibration windows")
    parser.add_argument("--evaluation_size", type=int, default=256, help="sequences of a model's own text")
    parser.add_argument("--max_windows", type=int, default=None, help="evaluate only the first of each corpus")
    parser.add_argument("--output", type=Path, default=Path("output/quantization.jsonl"))
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is missing, then print the tables."""
    options = parse_arguments()
    quiet_libraries()
    results = Results.read(options.output)
    for name in options.models:
        subject = read_subject(name, options)
        common = compare(subject, options, results)
        for bits, group_size in ((bits, group) for bits in options.bits for group in options.group_size):
            key = {**common, "bits": bits, "group_size": group_size}
            rows = [row for row in results.rows if key.items() <= row.items() and row["seed"] in options.seeds]
            print(f"\n{name}, {bits} bits, groups of {group_size}; {len(options.seeds)} seeds\n")
            print(table(rows, list(subject.evaluation), [*options.quantizers, *options.peers]))


if __name__ == "__main__":
    main()
