"""Tables for terminals: columns as wide as what is in them, and figures that stay readable at any size."""

import math
from collections.abc import Collection, Sequence

GAP = "  "


def aligned(rows: Sequence[Sequence[object]], *, left: Collection[int] = (0,)) -> list[str]:
    """Lines of a table without borders.

    Args:
        rows: Cells; rows may end early.
        left: Numbers of the columns that begin at the same place; the others end there, as figures do.

    >>> aligned([["", "dense"], ["perplexity", "8204.1 ±12.3"]])
    ['                    dense', 'perplexity  8204.1 ±12.3']
    """
    texts = [[str(cell) for cell in row] for row in rows]
    count = max(map(len, texts), default=0)
    widths = [max(len(row[column]) for row in texts if column < len(row)) for column in range(count)]
    return [
        GAP.join(
            cell.ljust(wide) if column in left else cell.rjust(wide)
            for column, (cell, wide) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in texts
    ]


def figure(value: float | None, digits: int = 4, sign: str = "") -> str:
    """A figure with so many decimals; three digits where that would show none, "n/a" where there is no figure.

    Args:
        value: None and not a number are no figures.
        digits: Decimals.
        sign: ``+`` writes the sign of what is above 0, too; ``,`` separates thousands.

    >>> figure(0.12345), figure(0.0000123), figure(8204.5), figure(3e9), figure(float("nan")), figure(-1.0, 2, "+")
    ('0.1235', '1.23e-05', '8204.5000', '3e+09', 'n/a', '-1.00')
    """
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    huge, tiny = abs(value) >= 1e9, 0 < abs(value) < 0.5 * 10.0**-digits
    return f"{value:{sign.replace(',', '')}.3g}" if huge or tiny else f"{value:{sign}.{digits}f}"


def exact(value: float) -> str:
    """The shortest text that means a number and no other: folders of two budgets need two names.

    >>> exact(0.5), exact(1.0), exact(0.5000001)
    ('0.5', '1', '0.5000001')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def ratio(value: float, whole: float) -> str:
    """A multiple such as ``0.512x``; "n/a" where there is nothing to compare with."""
    return f"{value / whole:.3f}x" if whole and math.isfinite(value) and math.isfinite(whole) else "n/a"
