"""Some of the examples; batches are sorted by length, so they are taken from everywhere."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import count_tokens

_HELD = 8
_FEWEST = 32


def spread(batches: Batches, tokens: int) -> Sequence[Mapping[str, Tensor]]:
    """Every so many-th example, so that about a number of tokens is left."""
    share = min(1.0, tokens / max(1, count_tokens(batches)))
    chosen = _where(batches, lambda index: int((index + 1) * share) > int(index * share))
    return chosen or [{name: value[:1] for name, value in batches[0].items()}]


def hold_out(batches: Batches) -> tuple[Batches, Batches]:
    """Set an eighth of the examples aside.

    Returns:
        The others, and those that judge what is made of the others. With fewer than 32 examples both are all of them:
        four examples judge nothing.
    """
    if sum(len(batch["attention_mask"]) for batch in batches) < _FEWEST:
        return batches, batches
    kept = _where(batches, lambda index: index % _HELD != _HELD // 2)
    return kept, _where(batches, lambda index: index % _HELD == _HELD // 2)


def together(batches: Batches, aside: Batches) -> Batches:
    """Both parts of what :func:`hold_out` gave, the others first."""
    return batches if aside is batches else [*batches, *aside]


def _where(batches: Batches, wanted: Callable[[int], bool]) -> list[Mapping[str, Tensor]]:
    """Examples whose number is wanted, in batches as before."""
    chosen: list[Mapping[str, Tensor]] = []
    before = 0
    for batch in batches:
        count = len(batch["attention_mask"])
        rows = [row for row in range(count) if wanted(before + row)]
        before += count
        if rows:
            chosen.append(batch if len(rows) == count else {name: value[rows] for name, value in batch.items()})
    return chosen
