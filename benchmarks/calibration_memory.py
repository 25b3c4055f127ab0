"""Peak memory of pruning block by block, with few and with ten times as many calibration examples.

    python -m benchmarks.calibration_memory --work_dir DIR [--examples 16] [--times 10] [--max_memory 0.1]

A language model of random weights passes block by block (``--max_memory`` is below its size), with hidden states in
files. Each run is a process of its own, whose peak resident memory is read when it ends; evaluation, which does not
depend on the number of examples, is kept short. The last line says how much the peak grows, and how much hidden states
alone would have added.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from shrinkformer.commands.locate import bundled_decoder

MIB = 2**20


def shape(hidden_size: int) -> dict[str, Any]:
    """Of an OPT with 6 blocks: 336 MB in float32 at a hidden size of 1024, nine tenths of it in its blocks."""
    return {
        "vocab_size": 8192,
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "num_hidden_layers": 6,
        "num_attention_heads": hidden_size // 64,
        "max_position_embeddings": 512,
    }


_RUN = """
import sys
from shrinkformer.commands import prune_opt
code = prune_opt.main(sys.argv[1:])
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print("peak", 1024 * int(line.split()[1]))
sys.exit(code)
"""


def build(folder: Path, hidden_size: int) -> int:
    """Write the checkpoint, with the demo model's tokenizer; its bytes."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.OPTForCausalLM(transformers.OPTConfig(**shape(hidden_size)))
        model.save_pretrained(folder, max_shard_size="10GB")
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(bundled_decoder())
        tokenizer.save_pretrained(folder)
    return weights.stat().st_size


def peak(folder: Path, examples: int, options: argparse.Namespace) -> int:
    """Peak resident bytes of one run."""
    flags = {
        "model_name": folder,
        "mu": options.mu,
        "method": options.method,
        "max_memory": options.max_memory,
        "sample_batch_size": examples,
        "sequence_length": options.sequence_length,
        "evaluation_windows": 1,
        "batch_size": options.batch_size,
        "device": "cpu",
        "output_dir": options.work_dir / f"output-{examples}",
        "offload_dir": options.work_dir / "offload",
    }
    words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-c", _RUN, "--bundled_data", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    return int(line.split()[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="for the checkpoint, moments and results: 6 GB")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--mu", type=float, default=0.5)
    parser.add_argument("--method", default="stat")
    parser.add_argument("--max_memory", type=float, default=0.1, help="GiB")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    options = parser.parse_args(arguments)
    folder = options.work_dir / f"random-opt-{options.hidden_size}"
    print(f"weights {build(folder, options.hidden_size) / MIB:,.0f} MiB, limit {options.max_memory * 1024:,.0f} MiB")
    print(f"{'examples':>9}{'tokens':>9}{'hidden states':>16}{'peak':>12}")
    peaks = {}
    for examples in (options.examples, options.times * options.examples):
        peaks[examples] = peak(folder, examples, options)
        tokens = examples * options.sequence_length
        hidden = 4 * tokens * options.hidden_size / MIB
        print(f"{examples:>9}{tokens:>9,}{hidden:>12,.0f} MiB{peaks[examples] / MIB:>8,.0f} MiB", flush=True)
    few, many = peaks.values()
    added = 4 * (options.times - 1) * options.examples * options.sequence_length * options.hidden_size
    print(
        f"peak with {options.times} times the examples: {many / few:.3f} of that with few, "
        f"{(many - few) / MIB:+,.0f} MiB; hidden states alone would add {added / MIB:,.0f} MiB"
    )
    (options.work_dir / "calibration_memory.json").write_text(json.dumps(peaks) + "\n")


if __name__ == "__main__":
    main()
