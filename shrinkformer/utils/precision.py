"""How exact the products of matrices are, and what types of numbers can hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shrinkformer.errors import NumericalError
from shrinkformer.utils.processor import Processor


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Switch autocast, TF32 (CUDA) and bfloat16 shortcuts (CPU) off inside, and leave every flag as it was."""
    with _products("ieee", "ieee", device):
        yield


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let processors round what goes into products, to TF32 (CUDA) or bfloat16 (CPU); sums and results stay float32.

    After :func:`round_rows`, such products are exact. Where a processor has no units for them, nothing changes.
    """
    with _products("tf32", "bf16" if Processor.here().bf16_products else "ieee", device):
        yield


def round_rows(rows: Tensor) -> Tensor:
    """Rows in float32 with the precision of bfloat16."""
    return rows.bfloat16().float()


def is_finite(tensor: Tensor) -> bool:
    """Whether nothing in a tensor is NaN or infinite; one pass, without a mask as large as the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN goes through
    return bool(torch.isfinite(low) & torch.isfinite(high))


def first_fault(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Index of the first entry that is NaN or infinite, and how many are; there must be one."""
    bad = (~torch.isfinite(tensor)).nonzero()
    return tuple(bad[0].tolist()), len(bad)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type.

    Args:
        name: Of the tensor, for the message.
        tensor: Finite where the result shall be.
        dtype: The type.

    Raises:
        NumericalError: An entry is too large for it.
    """
    if tensor.is_floating_point() and tensor.numel() and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        largest = torch.stack(torch.aminmax(tensor.detach())).abs().max()
        if torch.isfinite(largest) and not torch.isfinite(largest.to(dtype)):
            kind = str(dtype).removeprefix("torch.")
            raise NumericalError(
                f"{name}: its largest value, {float(largest):.4g}, overflows in {kind}, the type of the checkpoint, "
                f"which ends at {torch.finfo(dtype).max:.5g}; save the dense checkpoint in bfloat16 or float32 and "
                "start from that, or choose a larger --mu."
            )
    return tensor.to(dtype)


def half_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Let models compute in bfloat16 where that is fast, with float32 weights and sums.

    Args:
        device: Of the model.
        dtype: Of the model. One of half precision computes in its own type, as it will when it is used: a second type
            between its layers would be less exact, and norms take no two types at once.
    """
    fast = dtype == torch.float32 and (device.type != "cpu" or Processor.here().bf16_autocast)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@contextmanager
def _products(cuda: str, cpu: str, device: torch.device) -> Iterator[None]:
    """Products outside autocast and without gradients."""
    mkldnn: Any = torch.backends.mkldnn  # its stub does not know matmul
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, precision in zip(backends, (cuda, cpu), strict=True):
            backend.fp32_precision = precision
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
