"""Interpolative decomposition of activations: this package against pivoted QR of LAPACK, end to end.

Every competitor starts from the activations Z (tokens x columns) and ends with the kept columns J and the coefficients
T of ``Z ~ Z_J T``. They take turns within one run, because shared machines drift; medians are quoted. ``floor`` is
``N n^2`` flops at the speed of this machine's GEMM: a pass over the data costs that much however it is done.

    python benchmarks/interpolative.py --rows 16384 --columns 1536 --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import threadpoolctl
import torch
from torch import Tensor

from shrinkformer.prune.interpolative import interpolative_decomposition
from shrinkformer.prune.moments import Moments, Precision

Columns = tuple[Tensor, Tensor, Tensor]  # kept, eliminated, coefficients
SAME_ERROR = 1e-3


def gelu_activations(rows: int, columns: int, seed: int = 0) -> Tensor:
    """``GELU(H A + b)``, float32: features that decay like i^-0.6 with 4 outliers, uneven neurons, sparse biases."""
    generator = torch.Generator().manual_seed(seed)
    features = max(4, columns // 4)
    decay = torch.arange(1, features + 1).pow(-0.6)
    decay[:4] *= 4
    hidden = torch.randn(rows, features, generator=generator) * decay
    neurons = torch.exp(0.4 * torch.randn(columns, generator=generator))
    matrix = torch.randn(features, columns, generator=generator) * neurons
    bias = -0.3 + 0.3 * torch.randn(columns, generator=generator)
    return torch.nn.functional.gelu(hidden @ matrix + bias)


def ours(Z: Tensor, rank: int, precision: Precision) -> Columns:
    """Stream the second moment, choose columns, interpolate."""
    moments = Moments.zeros(Z.shape[1], Z.device, precision=precision)
    moments.update(Z)
    found = interpolative_decomposition(moments.second, rank)
    if Z.is_cuda:
        torch.cuda.synchronize()
    return found.kept, found.eliminated, found.coefficients


def lapack_qr(Z: np.ndarray[Any, Any], rank: int) -> Columns:
    """Column-pivoted QR of Z and one triangular solve, both in the precision of Z."""
    R, pivots = scipy.linalg.qr(Z, mode="r", pivoting=True, check_finite=False)
    T = scipy.linalg.solve_triangular(R[:rank, :rank], R[:rank, rank:], check_finite=False)
    return torch.from_numpy(pivots[:rank]), torch.from_numpy(pivots[rank:]), torch.from_numpy(T)


def scipy_interpolative(Z: np.ndarray[Any, Any], rank: int) -> Columns:
    """Interpolative decomposition of scipy.linalg.interpolative, without randomness (float64 only)."""
    import scipy.linalg.interpolative as sli

    pivots, T = sli.interp_decomp(Z.astype(np.float64), rank, rand=False)
    return torch.from_numpy(pivots[:rank]), torch.from_numpy(pivots[rank:]), torch.from_numpy(T)


def relative_error(Z: Tensor, found: Columns) -> float:
    """``||Z - Z_J T|| / ||Z||`` in float64, in batches."""
    kept, eliminated, T = (part.to(Z.device) for part in found)
    square = total = 0.0
    for start in range(0, Z.shape[0], 4096):
        batch = Z[start : start + 4096].double()
        square += float((batch[:, eliminated] - batch[:, kept] @ T.double()).square().sum())
        total += float(batch.square().sum())
    return float(np.sqrt(square / total))


def gemm_floor(Z: Tensor) -> float:
    """Seconds for N n^2 flops at the rate of a square product of this precision, best of 3."""
    square = Z[: Z.shape[1]].contiguous()
    n = square.shape[0]
    seconds = min(timed(lambda: _synchronised(square @ square[:, :n].T))[0] for _ in range(4))
    return seconds * Z.shape[0] * Z.shape[1] ** 2 / (2 * n * n * Z.shape[1])


def _synchronised(result: Tensor) -> Tensor:
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return wall seconds and result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare(Z: Tensor, rank: int, repeats: int, slow: bool) -> None:
    """Print one table for one precision."""
    host = Z.cpu().numpy()
    runs: dict[str, Callable[[], Columns]] = {"ours (auto)": lambda: ours(Z, rank, "auto")}
    if Z.dtype == torch.float64:
        runs["ours (mixed)"] = lambda: ours(Z, rank, "mixed")
    baseline = "scipy.linalg.qr + TRSM"
    runs[baseline] = lambda: lapack_qr(host, rank)
    if slow:
        runs["scipy.linalg.interpolative"] = lambda: scipy_interpolative(host, rank)
    ours(Z[:4096], rank, "auto")  # warm up libraries and thread pools
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    floors, found = [], {}
    for _ in range(repeats):
        floors.append(gemm_floor(Z))
        for name, run in runs.items():
            once, found[name] = timed(run)
            seconds[name].append(once)
    errors = {name: relative_error(Z, columns) for name, columns in found.items()}
    reference = statistics.median(seconds[baseline])
    print(
        f"\n{str(Z.dtype).removeprefix('torch.')}, {Z.shape[0]} x {Z.shape[1]}, rank {rank}, {Z.device}, {repeats} runs"
    )
    print(f"{'':28}{'median s':>10}{'min s':>9}{'max s':>9}{'speed-up':>10}{'error':>12}  same error")
    for name, times in seconds.items():
        median, same = statistics.median(times), errors[name] <= errors[baseline] * (1 + SAME_ERROR)
        row = f"{name:28}{median:10.3f}{min(times):9.3f}{max(times):9.3f}{reference / median:9.1f}x{errors[name]:12.6f}"
        print(row, " yes" if same else " NO")
    print(f"{'floor: N n^2 flops of GEMM':28}{statistics.median(floors):10.3f}{min(floors):9.3f}{max(floors):9.3f}")


def main() -> None:
    """Parse the flags and compare in float32 and float64."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--rank", type=int, help="columns to keep; default: half of them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on both sides")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of this package's side; LAPACK stays on the CPU")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    parser.add_argument("--slow", action="store_true", help="also time scipy.linalg.interpolative (a minute a run)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Z = gelu_activations(args.rows, args.columns)
    rank = args.columns // 2 if args.rank is None else args.rank
    with threadpoolctl.threadpool_limits(args.threads):
        for dtype in args.dtypes:
            compare(Z.to(args.device, getattr(torch, dtype)), rank, args.repeats, args.slow)


if __name__ == "__main__":
    main()
