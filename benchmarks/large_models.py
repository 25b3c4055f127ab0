"""Prune randomly initialised models of real size within a memory limit, and interrupt one.

    python -m benchmarks.large_models --work_dir DIR [--kind opt-1.3b llama-1b] [--max_memory 8]
    python -m benchmarks.large_models --work_dir DIR --kind llama-7b --device cuda --max_memory 40 \
        --sample_batch_size 128 --sequence_length 2048

Weights are random, so perplexities say nothing; time and memory are those of a real model. The pruning runs in a
process of its own, whose peak resident memory is what the table shows.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from shrinkformer.commands.locate import bundled_decoder

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-1.3b": (
        "OPT",
        {
            "vocab_size": 50272,
            "hidden_size": 2048,
            "word_embed_proj_dim": 2048,
            "ffn_dim": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
        },
    ),
    "llama-1b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-7b": (
        "Llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
    ),
}


def build(kind: str, folder: Path) -> None:
    """Write a random checkpoint in bfloat16, in shards of 1 GB, with the demo model's tokenizer."""
    if (folder / "config.json").is_file():
        return
    stem, sizes = SHAPES[kind]
    config = getattr(transformers, f"{stem}Config")(**sizes)
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(0)
        config.dtype = torch.bfloat16
        model = getattr(transformers, f"{stem}ForCausalLM")._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
    tokenizer = bundled_decoder()
    assert tokenizer is not None, "models/opt-mini has the tokenizer"
    loaded: Any = transformers.AutoTokenizer.from_pretrained(tokenizer)
    loaded.model_max_length = config.max_position_embeddings
    loaded.save_pretrained(folder)


def command(folder: Path, work_dir: Path, options: argparse.Namespace) -> list[str]:
    """The command line of one pruning run."""
    flags = {
        "model_name": folder,
        "mu": options.mu,
        "method": "stat",
        "max_memory": options.max_memory,
        "sample_batch_size": options.sample_batch_size,
        "sequence_length": options.sequence_length,
        "evaluation_windows": options.evaluation_windows,
        "batch_size": 1,
        "device": options.device,
        "output_dir": work_dir / "output",
        "offload_dir": work_dir / "offload",
    }
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "prune_opt.py", "--bundled_data", *arguments]


def interrupt(arguments: Sequence[str], work_dir: Path, kind: str) -> str:
    """Kill a run while it writes the pruned model; what is there afterwards."""
    target = work_dir / "output" / "opt"
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(target.glob(f".{kind}-*")):
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = [path.name for path in target.glob(f"{kind}-*") if not path.name.endswith(".resume")]
    return f"{kind}: killed while it wrote; checkpoints in place: {whole or 'none'}"


def run(kind: str, options: argparse.Namespace) -> str:
    """Prune one model and say what that took."""
    folder = options.work_dir / kind
    build(kind, folder)
    arguments = command(folder, options.work_dir, options)
    lines = [interrupt(arguments, options.work_dir, kind)] if options.interrupt else []
    began = time.time()
    subprocess.run(arguments, check=True)
    report = options.work_dir / "output" / "opt" / f"{kind}.jsonl"
    record = json.loads(report.read_text().splitlines()[-1])
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in record["seconds"].items())
    dense, pruned = (record[name]["parameters"] / 1e9 for name in ("dense", "pruned"))
    lines.append(
        f"{kind}: {dense:.2f} B parameters -> {pruned:.2f} B, MACs {record['ratio']['macs']:.4f}, "
        f"peak {record['peak_memory_bytes'] / 2**30:.2f} GiB of {options.max_memory:g} GiB, "
        f"{record['calibration_tokens']:,} tokens, {time.time() - began:.0f} s ({spent})"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="for checkpoints, moments and results: 50 GB")
    parser.add_argument("--kind", nargs="+", choices=SHAPES, default=["opt-1.3b", "llama-1b"])
    parser.add_argument("--mu", type=float, default=0.7)
    parser.add_argument("--max_memory", type=float, default=8.0, help="GiB")
    parser.add_argument("--sample_batch_size", type=int, default=8)
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--evaluation_windows", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--interrupt", action="store_true", help="kill a first run while it writes its checkpoint")
    options = parser.parse_args(arguments)
    results = [run(kind, options) for kind in options.kind]
    print("\n" + "\n".join(results))


if __name__ == "__main__":
    main()
