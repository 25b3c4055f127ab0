"""What each ingredient of the method ``shrink`` is worth: one after the other is taken out, all else stays.

python -m benchmarks.ablation --model_name ../shared/models/minilm-sst2 --task_name sst2 --data_dir ../shared/data

Flags and output are those of ``benchmarks.pruning``. Ingredients are taken out by patches to the method as it is, so
that the product needs no switches that only this comparison would use.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.pruning import Variant, compare
from shrinkformer.prune import damage, sequential, shrink
from shrinkformer.prune.budget import CostModel
from shrinkformer.prune.levels import BlockLevels
from shrinkformer.prune.methods import get_method
from shrinkformer.prune.passes import BlockPasses, DensePass
from shrinkformer.prune.ranked import rank_block
from shrinkformer.prune.regression import ridge_regression
from shrinkformer.prune.samples import spread
from shrinkformer.prune.search import Found
from shrinkformer.prune.sensitivity import Sensitivity, learn_sensitivity
from shrinkformer.prune.sequential import RefitErrors
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.sites import Site, block_sites
from shrinkformer.prune.statistics import Batches, LayerMoments

Patch = Callable[[], AbstractContextManager[object]]


def patched(module: object, name: str, replacement: object) -> Patch:
    """A patch of one function or class."""
    return lambda: mock.patch.object(module, name, replacement)


def all_directions_alike(*args: Any, **kwargs: Any) -> Sensitivity:
    """Errors cost the same in every direction of a sublayer's output."""
    found = learn_sensitivity(*args, **kwargs)
    return replace(found, metrics={name: torch.eye(len(one)).to(one) for name, one in found.metrics.items()})


def all_tokens_alike(*args: Any, **kwargs: Any) -> Sensitivity:
    """Errors cost the same at every token."""
    return replace(learn_sensitivity(*args, **kwargs), tokens={})


class SizesOfStat:
    """Sizes as STAT chooses them, in place of curves and search."""

    def __init__(self, levels: Sequence[BlockLevels], _curves: object, _damage: object, costs: CostModel, **_: Any):
        self._levels, self._costs = levels, costs

    def run(self) -> Found:
        """As ``Search.run``."""
        stat = get_method("stat")
        rankings = [
            rank_block(stat, level.view, LayerMoments(level.contexts, level.neurons), seed=0) for level in self._levels
        ]
        sizes = self._costs.sizes(stat.allocate(rankings, self._costs))
        return Found(sizes, 0.0, sizes)


def no_refit(_model: object, blocks: Sequence[object], *_: Any, **__: Any) -> list[RefitErrors]:
    """Blocks stay as they were fitted to the dense model's inputs."""
    return [RefitErrors(0.0, 0.0) for _ in blocks]


def ends_only(*args: Any) -> tuple[Site, ...]:
    """The layers that end a sublayer are refitted, those that make queries, keys, values and neurons are not."""
    return tuple(site for site in block_sites(*args) if site.residual)


_ending = sequential._ending  # the original, while it is patched


def residual_as_it_is(site: Site, passes: BlockPasses, dense: DensePass, index: int) -> tuple[Tensor, Tensor]:
    """Sublayers do not make up for what the residual stream has lost."""
    inputs, wanted = _ending(site, passes, dense, index)
    _, residual = passes.ending(site, index)
    return inputs, wanted + residual - dense.wanted(site, index)[1]


def a_quarter(batches: Batches, tokens: int) -> Batches:
    """Fewer examples for measuring damage."""
    return spread(batches, tokens // 4)


ALL = "all"

VARIANTS = {
    ALL: Variant("shrink"),
    "directions of outputs weighed": Variant(
        "shrink", patch=patched(shrink, "learn_sensitivity", all_directions_alike)
    ),
    "tokens weighed by effect": Variant("shrink", patch=patched(shrink, "learn_sensitivity", all_tokens_alike)),
    "narrow heads": Variant("shrink", ShrinkConfig(whole_heads=True)),
    "curves and search": Variant("shrink", patch=patched(shrink, "Search", SizesOfStat)),
    "search": Variant("shrink", ShrinkConfig(search_seconds=0)),
    "all tokens in the search": Variant("shrink", patch=patched(damage, "spread", a_quarter)),
    "refit": Variant("shrink", patch=patched(shrink, "refit_blocks", no_refit)),
    "refit of what comes before": Variant("shrink", patch=patched(sequential, "block_sites", ends_only)),
    "making up for lost residuals": Variant("shrink", patch=patched(sequential, "_ending", residual_as_it_is)),
    "chosen ridges": Variant(
        "shrink", patch=patched(sequential, "ridge_regression", partial(ridge_regression, ridges=(1e-4,)))
    ),
}
"""Rows are named after what is missing."""


def main() -> None:
    """Run what is missing, then print the tables."""
    compare(VARIANTS, __doc__)


if __name__ == "__main__":
    main()
