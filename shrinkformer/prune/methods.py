"""The registry of pruning methods.

A method says how to rank heads and neurons, how to split the budget among the blocks, and how the consumers are
corrected. Everything else, statistics, surgery, checkpoint and report, is common to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shrinkformer.architectures import LayerView
from shrinkformer.errors import InputError
from shrinkformer.prune import ranking
from shrinkformer.prune.allocation import allocate_at_threshold, allocate_globally, allocate_uniformly
from shrinkformer.prune.budget import CostModel, Counts
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.names import KPRUNE, METHOD_NAMES, RANKING, SHRINK
from shrinkformer.prune.ranking import Ranking
from shrinkformer.prune.refit import Correction


@dataclass(frozen=True)
class LayerRanking:
    """Rankings of one block."""

    heads: Ranking
    neurons: Ranking


class Method(Protocol):
    """What a pruning method has to offer.

    ``moments`` is None where ``needs_statistics`` is false. Rankings may be asked for twice, so they depend on nothing
    but their arguments; random methods draw from a generator that starts from ``seed`` and the index of the block.
    """

    @property
    def name(self) -> str:
        """Name for ``--method``."""

    @property
    def needs_statistics(self) -> bool:
        """Whether it needs second moments of the calibration examples; every correction does."""

    @property
    def correction(self) -> Correction:
        """What takes over from the columns that a consumer loses."""

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
        neurons, head order and block correction, and as many heads as make the worst head cost twice the mean neuron
        error. Layer weights are ``sqrt(blocks left + 1) + 1`` as for BERT; where outputs grow with depth, those of the
        code for OPT: errors over an exponential fit to each block's largest, and heads times 1.125 to the power of
        their rank. The MAC shares that the code types in are computed here.
    """

    name: str
    correction: Correction
    needs_statistics: bool = True
    trade: float = 2.0

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order heads by pivots."""
        assert moments is not None
        return ranking.rank_heads_by_pivots(view, moments, self.correction is Correction.CENTRED)

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order neurons by pivots."""
        assert moments is not None
        return ranking.rank_neurons_by_pivots(view, moments, self.correction is Correction.CENTRED)

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Cut all blocks at one weighted threshold."""
        heads = [rank.heads.scores for rank in rankings]
        neurons = [rank.neurons.scores for rank in rankings]
        if costs.pre_norm:
            heads = [scores * 1.125 ** np.arange(len(scores), 0, -1) for scores in _per_output(heads)]
            neurons = _per_output(neurons)
        else:
            weights = np.sqrt(np.arange(len(rankings), 0, -1) + 1) + 1  # an early error passes through more blocks
            heads = [scores * weight for scores, weight in zip(heads, weights, strict=True)]
            neurons = [scores * weight for scores, weight in zip(neurons, weights, strict=True)]
        tails = [rank.neurons.tails for rank in rankings]
        return allocate_globally(costs, heads, neurons, tails, trade=self.trade)


def _per_output(scores: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Scores of all blocks relative to how large they are at that depth, by an exponential fit of the first of each.

    Blocks that compute nothing but zeros say nothing about the others.
    """
    depth = [index for index, block in enumerate(scores) if block[0] > np.finfo(np.float64).tiny]
    first = np.log([scores[index][0] for index in depth])
    slope, start = np.polyfit(depth, first, deg=1) if len(depth) > 1 else (0.0, first.sum())
    return [block / np.exp(slope * index + start) for index, block in enumerate(scores)]


@dataclass(frozen=True)
class Magnitude:
    """The largest weights stay; the same share in every block."""

    name: str
    correction: Correction

    @property
    def needs_statistics(self) -> bool:
        """Only to correct."""
        return self.correction is not Correction.NONE

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
    correction: Correction

    @property
    def needs_statistics(self) -> bool:
        """Only to correct."""
        return self.correction is not Correction.NONE

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Shuffle heads."""
        return ranking.rank_at_random(view.heads, np.random.default_rng([seed, view.index, 0]))

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Shuffle neurons."""
        return ranking.rank_at_random(view.neurons, np.random.default_rng([seed, view.index, 1]))

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Keep the same share in every block."""
        return allocate_uniformly(costs)


@dataclass(frozen=True)
class Wanda:
    """The largest products of weights and inputs stay; the same share in every block.

    Source:
        Sun et al., Wanda, arXiv 2306.11695; for whole columns, with a refit, FASP, arXiv 2501.09412. Here the queries,
        keys and values of heads go as well.
    """

    name: str
    correction: Correction
    needs_statistics: bool = True

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order heads by products."""
        assert moments is not None
        return ranking.rank_heads_by_products(view, moments)

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order neurons by products."""
        assert moments is not None
        return ranking.rank_neurons_by_products(view, moments)

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Keep the same share in every block."""
        return allocate_uniformly(costs)


@dataclass(frozen=True)
class Flap:
    """What fluctuates most stays; the bias takes over the mean of the rest; one threshold for all blocks.

    Source:
        An et al., FLAP, arXiv 2312.11983, with its defaults: weighted variance of inputs, adaptive over blocks and
        sublayers. There a head costs as much as the neurons that have its parameters, here its MACs; and where a
        consumer has no bias, none is added.
    """

    name: str
    correction: Correction = Correction.BIAS
    needs_statistics: bool = True

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order heads by fluctuation."""
        assert moments is not None
        return ranking.rank_heads_by_fluctuation(view, moments)

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order neurons by fluctuation."""
        assert moments is not None
        return ranking.rank_neurons_by_fluctuation(view, moments)

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Cut heads and neurons of all blocks at one threshold."""
        lowest = min(float(rank.scores[-1]) for layer in rankings for rank in (layer.heads, layer.neurons))
        heads = [layer.heads.scores - lowest for layer in rankings]
        return allocate_at_threshold(costs, heads, [layer.neurons.scores - lowest for layer in rankings])


@dataclass(frozen=True)
class Obs:
    """What the output can do without, after the best refit of the rest, leaves first; the same share in every block.

    Source:
        The optimal brain surgeon for structures, as in ZipLM, arXiv 2302.04089, and OSSCAR, arXiv 2403.12983, on the
        inputs of the dense model; without their budget by measured latency and their local search.
    """

    name: str
    correction: Correction = Correction.LEAST_SQUARES
    needs_statistics: bool = True

    def rank_heads(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order heads by elimination."""
        assert moments is not None
        return ranking.rank_heads_by_elimination(view, moments)

    def rank_neurons(self, view: LayerView, moments: Moments | None, seed: int) -> Ranking:
        """Order neurons by elimination."""
        assert moments is not None
        return ranking.rank_neurons_by_elimination(view, moments)

    def allocate(self, rankings: Sequence[LayerRanking], costs: CostModel) -> Counts:
        """Keep the same share in every block."""
        return allocate_uniformly(costs)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Stat("stat", Correction.LEAST_SQUARES),
        Stat("stat-bias", Correction.CENTRED),
        Magnitude("magnitude", Correction.NONE),
        Magnitude("magnitude-refit", Correction.CENTRED),
        Random("random", Correction.NONE),
        Random("random-refit", Correction.CENTRED),
        Wanda("wanda", Correction.NONE),
        Wanda("wanda-refit", Correction.LEAST_SQUARES),
        Flap("flap"),
        Obs("obs"),
    )
}

assert tuple(METHODS) == RANKING, "a method that ranks has its name in prune/names.py, too"


def is_fitted(name: str) -> bool:
    """Whether a method fits weights to what the examples show."""
    return name in {SHRINK, KPRUNE} or (name in METHODS and METHODS[name].correction is not Correction.NONE)


def get_method(name: str) -> Method:
    """The pruning method of that name, of those that rank.

    Raises:
        InputError: There is none.
    """
    if name not in METHODS:
        raise InputError(f"--method {name!r} is not known; choose one of {', '.join(METHOD_NAMES)}.")
    return METHODS[name]
