"""The registry of pruning methods.

A method says how to rank heads and neurons, how to split the budget among the blocks, and whether the consumer weights
are refitted. Everything else, statistics, surgery, checkpoint and report, is common to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shrinkformer.architectures import LayerView
from shrinkformer.errors import InputError
from shrinkformer.prune import ranking
from shrinkformer.prune.budget import CostModel, Counts, allocate_globally, allocate_uniformly
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.ranking import Ranking


@dataclass(frozen=True)
class LayerRanking:
    """Rankings of one block."""

    heads: Ranking
    neurons: Ranking


class Method(Protocol):
    """What a pruning method has to offer.

    ``moments`` is None where ``refit`` is false. Rankings may be asked for twice, so they depend on nothing but their
    arguments; random methods draw from a generator that starts from ``seed`` and the index of the block.
    """

    @property
    def name(self) -> str:
        """Name for ``--method``."""

    @property
    def refit(self) -> bool:
        """Whether consumer weights take over what the removed columns did; needs calibration statistics."""

    @property
    def centred(self) -> bool:
        """Whether the consumer's bias takes over the mean of the removed columns."""

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order the heads of a block."""

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order the neurons of a block."""

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Choose how many heads and neurons every block keeps."""


@dataclass(frozen=True)
class Stat:
    """STAT: interpolative decomposition with one global threshold.

    Source:
        "STAT: Shrinking Transformers After Training", arXiv 2406.00061, and the authors' code: norm-weighted pivots for
        neurons, head order and block correction, layer weights ``sqrt(blocks left + 1) + 1``, and as many heads as make
        the worst head cost twice the mean neuron error. The MAC shares that the code types in are computed here.
    """

    name: str
    centred: bool
    refit: bool = True
    trade: float = 2.0

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order heads by pivots."""
        assert moments is not None
        return ranking.rank_heads_by_pivots(view, moments, self.centred)

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order neurons by pivots."""
        assert moments is not None
        return ranking.rank_neurons_by_pivots(view, moments, self.centred)

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Cut all blocks at one weighted threshold."""
        weights = np.sqrt(np.arange(len(rankings), 0, -1) + 1) + 1  # an early error passes through more blocks
        return allocate_globally(
            costs,
            head_scores=[rank.heads.scores * weight for rank, weight in zip(rankings, weights, strict=True)],
            neuron_scores=[rank.neurons.scores * weight for rank, weight in zip(rankings, weights, strict=True)],
            neuron_tails=[rank.neurons.tails for rank in rankings],
            trade=self.trade,
        )


@dataclass(frozen=True)
class Magnitude:
    """The largest weights stay; the same share in every block."""

    name: str
    refit: bool
    centred: bool

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order heads by the norms of their weights."""
        return ranking.rank_heads_by_magnitude(view)

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order neurons by the norms of their weights."""
        return ranking.rank_neurons_by_magnitude(view)

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Keep the same share in every block."""
        return allocate_uniformly(costs)


@dataclass(frozen=True)
class Random:
    """Any heads and neurons stay; the same share in every block."""

    name: str
    refit: bool
    centred: bool

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Shuffle heads."""
        return ranking.rank_at_random(view.heads, np.random.default_rng([seed, view.index, 0]))

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Shuffle neurons."""
        return ranking.rank_at_random(view.neurons, np.random.default_rng([seed, view.index, 1]))

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Keep the same share in every block."""
        return allocate_uniformly(costs)


DEFAULT_METHOD = "stat-bias"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Stat("stat", centred=False),
        Stat("stat-bias", centred=True),
        Magnitude("magnitude", refit=False, centred=False),
        Magnitude("magnitude-refit", refit=True, centred=True),
        Random("random", refit=False, centred=False),
        Random("random-refit", refit=True, centred=True),
    )
}


def get_method(name: str) -> Method:
    """The pruning method of that name.

    Raises:
        InputError: There is none.
    """
    if name not in METHODS:
        raise InputError(f"--method {name!r} is not known; choose one of {', '.join(METHODS)}.")
    return METHODS[name]
