"""What pruning models of 7 to 405 billion parameters takes: memory, traffic and time, from rates measured here.

    python -m benchmarks.scaling [--tokens 262144] [--processes 1 8] [--gpu]

The rates of products, of the factorisation and of the disk are measured on this machine; ``--gpu`` measures them on a
CUDA device. Everything else is arithmetic on shapes: no weights are made.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.commands.memory import GIB, Footprint, block_weights
from shrinkformer.efficiency.size import count_parameters
from shrinkformer.prune.interpolative import fold
from shrinkformer.prune.pivoting import pivoted_cholesky

SHAPES: dict[str, dict[str, int]] = {  # Llama 2 7B and 13B, Llama 3.1 70B and 405B
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    | {"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256},
}
LENGTH = 2048


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        products: Floating-point operations of matrix products in the type that models run in.
        moments: The same for second moments, in float32.
        solves: The same for the factorisation and the refit, in float64, over the whole of our own code.
        read: Bytes from disk.
        write: Bytes to disk.
    """

    products: float
    moments: float
    solves: float
    read: float
    write: float


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """The best of a few times."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return min(times)


def measure_rates(device: str) -> Rates:
    """Time each kind of work at a size that takes about a second on two cores."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16  # --dtype bfloat16: the way to run large models on any device
    rows = torch.randn(2048, 4096, generator=generator, device=device)
    left, right = rows.to(dtype), torch.randn(4096, 4096, generator=generator, device=device).to(dtype)
    n, kept = 2048, 1433
    second = rows[:, :n].double().T @ rows[:, :n].double()
    columns, old = torch.arange(kept, device=device), torch.randn(n, n, dtype=torch.float64, device=device)
    solving = seconds_of(lambda: (pivoted_cholesky(second), fold(second, columns, old)))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = Path(folder) / "bytes"
        block = torch.zeros(2**28, dtype=torch.uint8).numpy()
        write = seconds_of(lambda: block.tofile(file))
        read = seconds_of(file.read_bytes)
    return Rates(
        products=2 * 2048 * 4096 * 4096 / seconds_of(lambda: left @ right),
        moments=2 * 2048 * 4096 * 4096 / seconds_of(lambda: rows.T @ rows),
        solves=_solve_flops(n, kept, n) / solving,
        read=2**28 / read,
        write=2**28 / write,
    )


def _solve_flops(n: int, kept: int, outputs: int) -> float:
    """A pivoted Cholesky factorisation of n columns and the refit of a weight with so many outputs."""
    return n**3 / 3 + kept**3 / 3 + 2 * kept**2 * outputs


def shape_of(name: str) -> PreTrainedModel:
    """A model without weights."""
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=LENGTH)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def work_of(model: PreTrainedModel, tokens: int, rates: Rates, processes: int) -> dict[str, float]:
    """Seconds by step: examples are shared by the processes, factorisations are done by each."""
    view = layer_views(model)[0]
    blocks, inner = len(layer_views(model)), view.attention_output.in_features
    weights = block_weights(view.heads, view.neurons, view)
    attention = 4 * tokens * LENGTH * inner
    forward = blocks * (2 * tokens * weights + attention)
    moments = blocks * tokens * (view.neurons**2 + 2 * inner**2)  # heads twice: dense, and without the removed neurons
    kept = int(0.7 * view.neurons)
    per_block = _solve_flops(view.neurons, kept, view.hidden_size) + 2 * _solve_flops(inner, inner, view.hidden_size)
    solves = blocks * per_block
    statistics = blocks * 8 * (view.neurons**2 + inner**2)
    return {
        "two passes": 2 * forward / rates.products / processes,
        "moments": moments / rates.moments / processes,
        "solves": solves / rates.solves,
        "disk": (2 * 2 * count_parameters(model) + statistics) / rates.read + statistics / rates.write,
    }


def table(tokens: int, processes: Sequence[int], rates: Rates) -> str:
    """Markdown: one row per model."""
    lines = [
        "| model | weights | in memory | block by block | statistics on disk | hidden states | all-reduce per process |"
        + "".join(f" {count} process(es) |" for count in processes),
        "|---|---|---|---|---|---|---|" + "---|" * len(processes),
    ]
    for name in SHAPES:
        model = shape_of(name)
        footprint = Footprint.of(model, tokens, 1, LENGTH, torch.bfloat16)
        views = layer_views(model)
        hidden = 2 * tokens * views[0].hidden_size
        statistics = footprint.spilled - 2 * hidden
        reduced = 2 * (statistics + len(views) * 8 * views[0].attention_output.in_features ** 2)
        cells = []
        for count in processes:
            spent = work_of(model, tokens, rates, count)
            largest = max(spent, key=lambda step: spent[step])
            cells.append(f" {_time(sum(spent.values()))}, of it {largest} {_time(spent[largest])} |")
        lines.append(
            f"| {name} | {2 * count_parameters(model) / GIB:,.0f} GiB | {footprint.resident / GIB:,.0f} GiB | "
            f"{footprint.streamed / GIB:,.1f} GiB | {statistics / GIB:,.0f} GiB | {hidden / GIB:,.1f} GiB | "
            f"{reduced / GIB:,.0f} GiB |" + "".join(cells)
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then compute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128 * LENGTH)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args(arguments)
    rates = measure_rates("cuda" if options.gpu else "cpu")
    print(
        f"{options.tokens:,} tokens in windows of {LENGTH}; measured: products {rates.products / 1e9:,.0f} GFLOP/s, "
        f"moments {rates.moments / 1e9:,.0f}, factorisation and refit {rates.solves / 1e9:,.0f} (float64); disk "
        f"{rates.read / 1e9:.1f} GB/s read, {rates.write / 1e9:.1f} GB/s write\n"
    )
    print(table(options.tokens, options.processes, rates))


if __name__ == "__main__":
    main()
