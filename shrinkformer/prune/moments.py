"""Second moments of activations, streamed: everything that column selection and refit need to know about the data.

Selecting and refitting columns of an activation matrix Z (tokens x columns) depends on Z only through Z'Z and its
column sums. Those have a fixed size, add up over batches and processes, and are made of matrix products alone.

The precision rule: products may be rounded like the data, *sums* may not. Rounding Z is a small perturbation of the
data and leaves Z'Z positive semidefinite; rounding the running sum makes it indefinite, and Cholesky then fails from a
condition number of about 1e8 on. So batches of at most 4096 rows are multiplied in float32 and added in float64.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from shrinkformer.errors import InputError, NumericalError
from shrinkformer.utils.precision import exact_products, fast_products

_CONSTANT = 1e-13
"""Share of a column's second moment that is about its mean, below which that is rounding: of float32 data, squared."""

Precision = Literal["auto", "mixed", "double", "fast"]

_BATCH_ROWS = 4096  # float32 rounding inside one product grows with its length, the float64 sum outside does not
_PANELS = 8  # upper triangle in 8 row panels: 9/16 of the work of the full product, panels still fast to multiply
_MIN_PANEL = 128
_FLOAT32_SAFE = (2.0**-40, 2.0**40)  # largest |z| whose squares and sums neither overflow nor vanish in float32


class Moments:
    """Running sums over tokens: Z'Z, the column sums of Z and the number of tokens, in float64.

    Precision of the products inside a batch (sums are always float64):

    * ``"auto"``: float64 for float64 rows, and for the first ``2 n`` tokens of any type, because few tokens make Z'Z
      nearly singular and cost little; float32 for other float32, bfloat16 and float16 rows (products of the two
      16-bit types are exact in float32).
    * ``"mixed"``: float32 for every type, about twice as fast for float64 rows. Relative error of Z'Z about 5e-8, so
      residuals below about 2e-4 of ``||Z||`` drown; activations of transformers lie far above that.
    * ``"double"``: float64 for every type.
    * ``"fast"``: as the processor multiplies float32 fastest; of rows that are rounded to bfloat16, this is exact.

    Rows whose squares would overflow or vanish in float32 are multiplied in float64 whatever the policy.
    """

    def __init__(self, second: Tensor, total: Tensor, count: int, *, precision: Precision = "auto") -> None:
        n = total.shape[0] if total.ndim == 1 else -1
        if second.shape != (n, n) or second.dtype != torch.float64 or total.dtype != torch.float64 or count < 0:
            raise InputError(
                f"moments need float64 second (n, n), total (n,) and count >= 0, got {second.dtype} "
                f"{tuple(second.shape)}, {total.dtype} {tuple(total.shape)} and {count}"
            )
        if precision not in ("auto", "mixed", "double", "fast"):
            raise InputError(f"precision is {precision!r}; choose auto, mixed, double or fast")
        self._second = second
        self._stale = False  # true while only the upper panels of _second are up to date
        self.total = total
        self.count = count
        self.precision: Precision = precision

    @classmethod
    def zeros(cls, n: int, device: torch.device | str = "cpu", *, precision: Precision = "auto") -> "Moments":
        """Return the moments of no tokens at all, for ``n`` columns on ``device``."""
        if n < 1:
            raise InputError(f"moments need at least one column, got n={n}")
        second = torch.zeros((n, n), dtype=torch.float64, device=device)
        return cls(second, torch.zeros(n, dtype=torch.float64, device=device), 0, precision=precision)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, precision: Precision = "auto") -> "Moments":
        """Rebuild moments from :meth:`state_dict`; the tensors are copied.

        Raises:
            InputError: A key is missing or a shape or type does not fit.
        """
        missing = {"second", "total", "count"} - set(state)
        if missing:
            raise InputError(f"moments lack {sorted(missing)}; they have {sorted(state)}: save them with state_dict()")
        return cls(state["second"].clone(), state["total"].clone(), int(state["count"]), precision=precision)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of ``second``, ``total`` and ``count`` (int64 scalar), fit for safetensors."""
        return {"second": self.second.clone(), "total": self.total.clone(), "count": torch.tensor(self.count)}

    def __repr__(self) -> str:
        return f"Moments(n={self.n}, count={self.count}, device={self.device}, precision={self.precision!r})"

    @property
    def n(self) -> int:
        """Number of columns."""
        return self.total.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the sums are kept."""
        return self.total.device

    @property
    def second(self) -> Tensor:
        """Uncentred second moment Z'Z, (n, n) float64, exactly symmetric. A sum, not divided by the count."""
        if self._stale:
            for start, stop in self._panels():
                block = self._second[start:stop, start:stop]
                block.copy_(block.triu() + block.triu(1).T)
                self._second[stop:, start:stop] = self._second[start:stop, stop:].T
            self._stale = False
        return self._second

    @property
    def mean(self) -> Tensor:
        """Column means, (n,) float64.

        Raises:
            NumericalError: No token was seen yet.
        """
        self._require_tokens("a mean")
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Return the centred second moment Z'Z - N mu mu', (n, n) float64: a sum as well, not divided.

        Columns that are constant up to rounding are zero: what cancellation leaves of them is no second moment.

        Raises:
            NumericalError: No token was seen yet.
        """
        self._require_tokens("a covariance")
        centred = self.second - torch.outer(self.total, self.total / self.count)
        constant = centred.diagonal() <= _CONSTANT * self.second.diagonal()
        centred[constant] = 0.0
        centred[:, constant] = 0.0
        return centred

    def update(self, rows: Tensor) -> None:
        """Add tokens. Costs ``N n^2`` flops (the upper triangle only), in batches of at most 4096 rows.

        Args:
            rows: (N, n), any floating type, strides and device; N = 0 is allowed. Gradients are not followed.

        Raises:
            InputError: Wrong shape or not floating point.
            NumericalError: NaN or infinity among the rows; nothing has been added then.
        """
        if rows.ndim != 2 or rows.shape[1] != self.n or not rows.is_floating_point():
            raise InputError(
                f"moments of {self.n} columns take floating point rows (N, {self.n}), got {rows.dtype} "
                f"{tuple(rows.shape)}; flatten batch and sequence first"
            )
        rows = rows.detach()
        if rows.shape[0] == 0:
            return
        safe = self._check_range(rows)
        with fast_products(self.device) if self.precision == "fast" else exact_products(self.device):
            for start in range(0, rows.shape[0], _BATCH_ROWS):
                batch = rows[start : start + _BATCH_ROWS]
                self._add(batch.to(self.device, self._product_dtype(batch, safe)).contiguous())

    def merge(self, other: "Moments") -> None:
        """Add the tokens that ``other`` has seen.

        Raises:
            InputError: The numbers of columns differ.
        """
        if other.n != self.n:
            raise InputError(f"cannot merge moments of {other.n} columns into moments of {self.n}")
        self._second = self.second.add_(other.second.to(self.device))
        self.total += other.total.to(self.device)
        self.count += other.count

    def all_reduce(self) -> None:
        """Sum over all processes, in float64; does nothing unless ``torch.distributed`` is initialised."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        count = torch.tensor(self.count, dtype=torch.int64, device=self.device)
        for tensor in (self.second, self.total, count):
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM)
        self.count = int(count)

    def _panels(self) -> Iterator[tuple[int, int]]:
        width = max(_MIN_PANEL, -(-self.n // _PANELS))
        for start in range(0, self.n, width):
            yield start, min(start + width, self.n)

    def _product_dtype(self, batch: Tensor, float32_safe: bool) -> torch.dtype:
        few = self.count + batch.shape[0] <= 2 * self.n
        exact = self.precision == "double" or (self.precision == "auto" and (batch.dtype == torch.float64 or few))
        return torch.float64 if exact or not float32_safe else torch.float32

    def _add(self, batch: Tensor) -> None:
        """Add one contiguous batch of float32 or float64 rows: a SYRK in row panels, at the speed of GEMM."""
        self._stale = True
        for start, stop in self._panels():
            left, right, target = batch[:, start:stop].T, batch[:, start:], self._second[start:stop, start:]
            if batch.dtype == torch.float64:
                target.addmm_(left, right)
            else:
                target.add_(left @ right)
        self.total += batch.new_ones(batch.shape[0]) @ batch
        self.count += batch.shape[0]

    def _check_range(self, rows: Tensor) -> bool:
        """Refuse NaN and infinity before anything is added; say whether float32 can hold the squares."""
        low: float
        high: float
        low, high = torch.stack(torch.aminmax(rows)).double().tolist()
        largest = max(-low, high)
        if not (low > -float("inf") and high < float("inf")):  # also true for NaN, which compares false
            bad = int((~torch.isfinite(rows)).any(0).sum())
            raise NumericalError(
                f"NaN or infinity in {bad} of {self.n} columns of a batch of {rows.shape[0]} tokens: the model "
                f"overflows in {rows.dtype}; load it in float32 or bfloat16, or look for broken weights"
            )
        return largest == 0.0 or _FLOAT32_SAFE[0] <= largest <= _FLOAT32_SAFE[1]

    def _require_tokens(self, what: str) -> None:
        if self.count == 0:
            raise NumericalError(f"{what} needs at least one token, none was seen; call update() first")
