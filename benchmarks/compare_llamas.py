"""Compare pruning methods on small Llamas with grouped queries, on text that the dense model writes itself.

python -m benchmarks.compare_llamas --models_dir ../shared/models

No tokenizer is needed: calibration and evaluation sequences are drawn from the dense model (temperature 1, from the BOS
token). Its perplexity on them is the exp of its own entropy, the least that any model can reach; the logarithm of a
pruned model's perplexity over the dense one's estimates the Kullback-Leibler divergence per token. Every pruned model
is checked: whole groups of queries left with their key and value head, and generation with and without a cache agrees.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.compare_decoders import Comparison, add_arguments
from benchmarks.results import Record, Results
from shrinkformer.architectures import layer_views
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.resume import fingerprint
from shrinkformer.prune.shrink_config import ShrinkConfig

MODELS = ("babyllama-tok105/hf_converted", "stories260K/hf_converted")

EVALUATION_SEED = 1_000_000
"""Calibration sequences are drawn with the seeds of the command line, evaluation sequences with this one."""

CORPUS = "own text"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models_dir", type=Path, default=Path("../shared/models"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="folders below --models_dir")
    parser.add_argument("--evaluation_size", type=int, default=256, help="sequences to evaluate on")
    add_arguments(parser, mu=[0.7, 0.5], output="compare_llamas.jsonl")
    return parser.parse_args(arguments)


def write_text(model: PreTrainedModel, size: int, seed: int) -> Tensor:
    """Sequences that a model writes, as long as it can, ``(size, positions)`` int64.

    They do not end with a story: a model of TinyStories goes on with the next one.

    Args:
        model: A causal language model; the global random state stays as it was.
        size: How many.
        seed: Of the draw.
    """
    config = model.config
    start = torch.full((size, 1), config.bos_token_id, device=model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _generate(model, start, config.max_position_embeddings - 1, do_sample=True, temperature=1.0, top_k=0)


@torch.no_grad()
def _generate(model: PreTrainedModel, prompt: Tensor, new: int, **settings: Any) -> Tensor:
    """Prompts, ``(rows, tokens)``, with ``new`` tokens behind each; no token ends a row before."""
    generating: Any = model
    generating.generation_config.eos_token_id = None
    ids: Tensor = generating.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, pad_token_id=0, **settings
    )
    return ids


def check_groups(dense: PreTrainedModel, pruned: Pruned) -> bool:
    """Whether every block lost whole groups: a key and value head together with all queries that share it, untouched.

    Read from the weights themselves, without the records of architectures.
    """
    size, queries = dense.config.head_dim, dense.config.num_attention_heads // dense.config.num_key_value_heads
    blocks: Any = zip(dense.base_model.layers, pruned.model.base_model.layers, pruned.plan.layers, strict=True)
    for before, after, layer in blocks:
        old, new, kept = before.self_attn, after.self_attn, list(layer.heads)
        for name, width in (("q_proj", queries * size), ("k_proj", size), ("v_proj", size)):
            rows = getattr(old, name).weight.unflatten(0, (-1, width))[kept].flatten(0, 1)
            if not torch.equal(getattr(new, name).weight, rows):
                return False
        if new.o_proj.in_features != len(kept) * queries * size:
            return False
    return True


def check_cache(model: PreTrainedModel, prompts: Tensor, new: int = 48) -> bool:
    """Whether greedy generation gives the same tokens with a cache of keys and values and without.

    In float64, where rounding does not decide between two tokens.
    """
    exact = copy.deepcopy(model).double()
    cached, recomputed = (
        _generate(exact, prompts, new, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    return torch.equal(cached, recomputed)


def require_disjoint(calibration: Tensor, evaluation: Tensor) -> None:
    """Check that no sequence is in both sets."""
    common = {tuple(row) for row in calibration.tolist()} & {tuple(row) for row in evaluation.tolist()}
    if common:
        raise ValueError(f"{len(common)} sequences are in both sets; choose other --seeds or longer sequences")


def compare(folder: str, options: argparse.Namespace, results: Results) -> None:
    """Measure what is missing of one model, then print its table."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(options.models_dir / folder, dtype=torch.float32)
    views, length = layer_views(model), model.config.max_position_embeddings
    evaluation = write_text(model, options.evaluation_size, EVALUATION_SEED)
    key = {
        "model": folder,
        "weights": fingerprint(model)[:12],
        "samples": options.sample_batch_size,
        "windows": len(evaluation),
    }

    def look_at(pruned: Pruned) -> Record:
        whole = check_groups(model, pruned)
        same = check_cache(pruned.model, evaluation[:8, :16])
        return {"groups": pruned.plan.heads, "neurons": pruned.plan.neurons, "whole_groups": whole, "cache": same}

    config = ShrinkConfig(search_seconds=options.search_seconds)
    comparison = Comparison(
        model, {CORPUS: evaluation}, options.batch_size, key, results, look_at, options.uniform, config
    )
    comparison.run_dense()
    for seed in options.seeds:
        calibration = write_text(model, options.sample_batch_size, seed)
        require_disjoint(calibration, evaluation)
        for method in options.methods:
            comparison.run_method(method, seed, options.mu, calibration)
    print(f"\n{folder}: {len(views)} blocks of {views[0].heads} groups with {views[0].queries} queries each")
    print(f"perplexity on {len(evaluation)} sequences of {length} tokens that the dense model")
    print(f"wrote from BOS at temperature 1; calibrated on {options.sample_batch_size} others, seeds {options.seeds}\n")
    print(comparison.table(options.methods, options.mu, options.seeds))
    pruned_rows = [row for row in results.rows if key.items() <= row.items() and row["method"] != "dense"]
    print(checks(pruned_rows, options.seeds[0]))


def checks(rows: Sequence[Record], seed: int) -> str:
    """What was found of every pruned model: the sizes of those of one seed, how many passed the checks of all.

    Args:
        rows: Points of pruned models.
        seed: The seed whose sizes are shown.
    """
    lines = [f"\n| kept by block, seed {seed} | mu | groups | neurons |", "|---|---|---|---|"]
    for row in rows:
        if row["seed"] == seed:
            groups, neurons = (" ".join(map(str, row[name])) for name in ("groups", "neurons"))
            lines.append(f"| {row['method']} | {row['mu']:g} | {groups} | {neurons} |")
    whole, same = (sum(row[name] for row in rows) for name in ("whole_groups", "cache"))
    lines.append(
        f"\nwhole groups of queries, keys and values removed, the rest untouched: {whole} of {len(rows)} models"
    )
    lines.append(f"greedy generation with a cache equals that without: {same} of {len(rows)} models")
    return "\n".join(lines)


def main() -> None:
    """Compare on every model."""
    options = parse_arguments()
    quiet_libraries()
    results = Results.read(options.output)
    for folder in options.models:
        compare(folder, options, results)


if __name__ == "__main__":
    main()
