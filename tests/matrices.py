"""Matrices and oracles for the tests of the numerical kernel."""

import math

import numpy as np
import scipy.linalg
import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gelu(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """GELU(H A + b) with decaying features and uneven neurons: what a feed-forward layer hands on."""
    features = max(1, columns // 4)
    hidden = normal(rows, features, seed=seed) * torch.arange(1, features + 1) ** -0.6
    scales = torch.exp(0.4 * normal(columns, seed=seed + 1))
    bias = -0.3 + 0.3 * normal(columns, seed=seed + 2)
    return torch.nn.functional.gelu(hidden @ normal(features, columns, seed=seed + 3) * scales + bias)


def geometric(rows: int, columns: int, condition: float, seed: int = 0) -> torch.Tensor:
    left = torch.linalg.qr(normal(rows, columns, seed=seed)).Q
    right = torch.linalg.qr(normal(columns, columns, seed=seed + 1)).Q
    return left * torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64) @ right


def kahan(n: int, c: float = 0.285) -> torch.Tensor:
    """Upper triangular, no pivoting by greedy choice, almost singular all the same."""
    s = math.sqrt(1 - c * c)
    matrix = torch.eye(n, dtype=torch.float64) - c * torch.ones(n, n, dtype=torch.float64).triu(1)
    return torch.diag(s ** torch.arange(n, dtype=torch.float64)) @ matrix * (1 - 1e-6 * torch.arange(n))


def gram(Z: torch.Tensor) -> torch.Tensor:
    return Z.T @ Z


def geqp3(Z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    R, pivots = scipy.linalg.qr(Z.numpy(), mode="r", pivoting=True)
    return R, pivots


def dpstrf(G: torch.Tensor) -> tuple[np.ndarray, int]:
    _, pivots, rank, _ = scipy.linalg.lapack.dpstrf(G.numpy(), lower=0)
    return pivots - 1, rank


def left_over(Z: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Z minus its projection on the kept columns, by QR of Z itself."""
    if not len(kept):
        return Z
    Q = torch.linalg.qr(Z[:, kept]).Q
    rest = Z - Q @ (Q.T @ Z)
    return rest - Q @ (Q.T @ rest)


def squared(Z: torch.Tensor) -> float:
    return float(Z.square().sum())


MATRICES = {
    "gelu": gelu(1500, 160),
    "gaussian": normal(400, 100),
    "cond 1e3": geometric(300, 120, 1e3),
    "cond 1e6": geometric(300, 120, 1e6),
    "wide": normal(30, 70, seed=5),
}


# 1, 2, 3, 4, 14: permutation, oracles, greedy certificate, loss, block sizes
