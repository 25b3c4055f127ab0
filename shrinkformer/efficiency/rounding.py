"""Which multiples of neurons matrix products on this machine like, found by measuring."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from shrinkformer.efficiency.latency import time_in_turns
from shrinkformer.errors import InputError

MULTIPLES = (1, 4, 8, 16, 32, 64)
"""What is tried."""

TOLERANCE = 0.03
"""How much slower than the best a smaller multiple may be; finer sizes use a budget better."""

_SHARES = (0.3, 0.5, 0.7)  # of the neurons: the sizes that pruning leaves
_TOKENS = 128  # a call is short, so that some calls run undisturbed where others compute, too
_REPEATS = (5, 150)  # at least and at most


@dataclass(frozen=True)
class Rounding:
    """The multiple that was chosen.

    Attributes:
        multiple: The smallest one that is nearly as fast as the best.
        costs: Time per neuron for each multiple that was tried, relative to the fastest.
    """

    multiple: int
    costs: dict[int, float]

    @classmethod
    def of(cls, costs: dict[int, float], tolerance: float = TOLERANCE) -> "Rounding":
        """The choice for times per neuron.

        >>> Rounding.of({1: 2.4, 4: 2.1, 8: 2.04, 16: 2.0})
        Rounding(multiple=8, costs={1: 1.2, 4: 1.05, 8: 1.02, 16: 1.0})
        """
        best = min(costs.values())
        relative = {multiple: cost / best for multiple, cost in sorted(costs.items())}
        return cls(next(multiple for multiple, cost in relative.items() if cost <= 1 + tolerance), relative)

    def __str__(self) -> str:
        shown = ", ".join(f"{multiple}: {cost:.3f}" for multiple, cost in self.costs.items())
        return f"{self.multiple} (time per neuron by multiple: {shown})"


def odd_multiple(width: int, multiple: int) -> int:
    """The largest number up to ``width`` that is a multiple of this, but not of its double; 0 if there is none.

    >>> odd_multiple(100, 1), odd_multiple(100, 16), odd_multiple(100, 64), odd_multiple(100, 128)
    (99, 80, 64, 0)
    """
    count = width // multiple
    return multiple * (count - (count % 2 == 0)) if count else 0


def choose_multiple(
    hidden_size: int,
    neurons: int,
    *,
    gated: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    limit: float = 5.0,
    seed: int = 0,
) -> Rounding:
    """Time the products of feed-forward layers of several sizes, and choose what their sizes should be multiples of.

    Near 0.3, 0.5 and 0.7 of the neurons, sizes that are multiples of a candidate and of no more are timed in turns.
    What counts is the time per neuron, that is at equal MACs, of the fastest run, which is the least disturbed one.

    Args:
        hidden_size: Width of the residual stream.
        neurons: Of a block before pruning.
        gated: Whether a neuron has a gate.
        device: Where models run; it is synchronised before the clock is read.
        dtype: Of the weights.
        limit: Seconds that it may take, as long as every size gets its five turns.
        seed: Of the private generator of the numbers.

    Raises:
        InputError: A size is not positive.
    """
    if min(hidden_size, neurons) < 1:
        raise InputError(f"{neurons} neurons of {hidden_size} inputs: both must be positive.")
    place = torch.device(device)
    tried = [multiple for multiple in MULTIPLES if odd_multiple(int(_SHARES[0] * neurons), multiple)] or [1]
    widths = {
        (multiple, share): max(1, odd_multiple(int(share * neurons), multiple))
        for multiple in tried
        for share in _SHARES
    }
    generator = torch.Generator().manual_seed(seed)
    make = partial(_random, generator=generator, device=place, dtype=dtype)
    inputs = make(_TOKENS, hidden_size)
    calls = {
        key: _feed_forward(inputs, make(width, hidden_size), make(_TOKENS, width), make(hidden_size, width), 1 + gated)
        for key, width in widths.items()
    }
    with torch.inference_mode():
        turn = sum(min(values) for values in time_in_turns(calls, place, repeats=2).values())
        seconds = time_in_turns(calls, place, repeats=int(np.clip(limit / turn, *_REPEATS)))
    costs = np.array([[min(seconds[one, share]) / widths[one, share] for share in _SHARES] for one in tried])
    relative = (costs / costs.mean(axis=0)).mean(axis=1)  # every size counts alike
    return Rounding.of(dict(zip(tried, relative.tolist(), strict=True)))


def _random(rows: int, columns: int, *, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=generator).to(device, dtype)


def _feed_forward(inputs: Tensor, into: Tensor, inner: Tensor, out: Tensor, times: int) -> Callable[[], Tensor]:
    """The products of a feed-forward layer, without what stands between them."""

    def call() -> Tensor:
        for _ in range(times):
            linear(inputs, into)
        return linear(inner, out)

    return call
