"""Prune a model: calibrate once, then produce a smaller model for any budget."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.methods import DEFAULT_METHOD, LayerRanking, Method, get_method
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.plan import LayerPlan, Plan
from shrinkformer.prune.refit import Consumer, refit_consumer, slice_consumer
from shrinkformer.prune.resume import BlockStore
from shrinkformer.prune.statistics import Progress, Statistics, collect_statistics
from shrinkformer.prune.stream import BlockStream, count_tokens
from shrinkformer.prune.surgery import head_columns, remove_heads, remove_neurons

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Pruned:
    """A smaller model, what it keeps, and how long each step took in seconds."""

    model: PreTrainedModel
    plan: Plan
    seconds: dict[str, float]


@dataclass(frozen=True)
class Calibrated:
    """A model with everything that was learnt about it; :meth:`prune` takes any budget.

    Attributes:
        model: The dense model, in evaluation mode; never changed.
        batches: The calibration examples as model inputs.
        method: The pruning method.
        seed: Seed of random methods, recorded in plans.
        statistics: Second moments, or None where the method needs none.
        rankings: One per block.
        seconds: Time of calibration and selection.
    """

    model: PreTrainedModel
    batches: Batches
    method: Method
    seed: int
    statistics: Statistics | None
    rankings: tuple[LayerRanking, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    def prune(self, budget: Budget) -> Pruned:
        """A smaller copy of the model that meets a budget.

        Raises:
            BudgetError: The budget is below what every block must keep.
        """
        seconds: dict[str, float] = {}
        with timed(seconds, "allocation"):
            costs = CostModel.of(layer_views(self.model), budget)
            counts = self.method.allocate(self.rankings, costs)
        with timed(seconds, "refit"), torch.no_grad():
            model = copy.deepcopy(self.model)
            layers = self._remove_neurons(model, counts)
            layers = self._remove_heads(model, counts, layers)
        plan = Plan(
            method=self.method.name,
            mu=budget.mu,
            seed=self.seed,
            sequence_length=budget.sequence_length,
            dense_macs=costs.dense,
            macs=costs.macs(counts),
            layers=tuple(layers),
        )
        describe_sizes(model, plan)
        return Pruned(model, plan, seconds)

    def _remove_neurons(self, model: PreTrainedModel, counts: Counts) -> list[LayerPlan]:
        layers = []
        for view, ranking, count in zip(layer_views(model), self.rankings, counts.neurons, strict=True):
            moments = self.statistics.layers[view.index].neurons if self.statistics else None
            kept = _best(ranking.neurons.order, count, model.device)
            consumer = self._consumer(view.feed_forward_output, moments, kept)
            if count < view.neurons:
                remove_neurons(view, kept, consumer)
            layers.append(LayerPlan(heads=(), neurons=tuple(kept.tolist()), ffn_error=consumer.error))
        return layers

    def _remove_heads(self, model: PreTrainedModel, counts: Counts, layers: list[LayerPlan]) -> list[LayerPlan]:
        """Remove heads, as seen in the model whose neurons are already gone.

        As published: heads are ordered and refitted on what they compute there; only how many each block keeps was
        settled on the dense model.
        """
        views = layer_views(model)
        stream = BlockStream(model, views[0].block, self.batches) if self.statistics else None
        result = []
        for view, layer, count in zip(views, layers, counts.heads, strict=True):
            order, moments = self.rankings[view.index].heads.order, None
            if stream is not None:
                moments = Moments.zeros(view.attention_output.in_features, model.device)
                stream.run(view.block, {view.attention_output: moments.update})
                order = self.method.rank_heads(view, moments, self.seed).order
            kept = _best(order, count, model.device)
            consumer = self._consumer(view.attention_output, moments, head_columns(kept, view.head_size))
            if count < view.heads:
                remove_heads(view, kept, consumer)
            result.append(replace(layer, heads=tuple(kept.tolist()), attention_error=consumer.error))
        return result

    def _consumer(self, linear: nn.Linear, moments: Moments | None, kept: Tensor) -> Consumer:
        if moments is None or len(kept) == linear.in_features:
            return slice_consumer(linear, kept)
        return refit_consumer(linear, moments, kept, centred=self.method.centred)


def calibrate(
    model: PreTrainedModel,
    batches: Batches,
    *,
    method: str = DEFAULT_METHOD,
    seed: int = 0,
    progress: Progress = iter,
    store: BlockStore | None = None,
) -> Calibrated:
    """Learn everything about a model that pruning it to any budget needs.

    Args:
        model: Any model with an architecture record, in float32 or float64.
        batches: Model inputs with an ``attention_mask``; labels are not needed.
        method: Name of a pruning method, see ``METHODS``.
        seed: Seed of random methods.
        progress: Wraps the loop over the blocks, for a progress bar.
        store: Keeps finished blocks on disk and gives back those of an interrupted run.

    Raises:
        InputError: The method is not known.
        UnsupportedModelError: There is no architecture record for the model.
        NumericalError: The model computes NaN or infinity on the examples.
    """
    chosen = get_method(method)
    model.eval()
    seconds: dict[str, float] = {}
    views = layer_views(model)
    with timed(seconds, "calibration"):
        statistics = collect_statistics(model, batches, progress=progress, store=store) if chosen.refit else None
    with timed(seconds, "selection"), torch.no_grad():
        rankings = tuple(
            LayerRanking(
                heads=chosen.rank_heads(view, statistics.layers[view.index].heads if statistics else None, seed),
                neurons=chosen.rank_neurons(view, statistics.layers[view.index].neurons if statistics else None, seed),
            )
            for view in views
        )
    return Calibrated(model, batches, chosen, seed, statistics, rankings, seconds)


def prune_model(
    model: PreTrainedModel,
    batches: Batches,
    *,
    mu: float,
    method: str = DEFAULT_METHOD,
    seed: int = 0,
    sequence_length: float | None = None,
    round_to: int = 1,
) -> Pruned:
    """A smaller copy of a model, in one call.

    Args:
        model: Any model with an architecture record, in float32 or float64.
        batches: Calibration examples: model inputs with an ``attention_mask``; labels are not needed.
        mu: Fraction of the MACs that stays, in (0, 1].
        method: Name of a pruning method, see ``METHODS``.
        seed: Seed of random methods.
        sequence_length: Length in tokens at which MACs are counted; the mean of the examples by default.
        round_to: Neurons of a block are a multiple of this.

    Raises:
        InputError: An argument is out of its range.
        BudgetError: The budget is below what every block must keep.
    """
    if sequence_length is None:
        sequence_length = count_tokens(batches) / sum(len(batch["attention_mask"]) for batch in batches)
    budget = Budget(mu, sequence_length, round_to)
    return calibrate(model, batches, method=method, seed=seed).prune(budget)


def _best(order: NDArray[np.int64], count: int, device: torch.device) -> Tensor:
    """The first indices of an order, ascending."""
    return torch.as_tensor(np.sort(order[:count]), device=device)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that a block of code takes to ``seconds[name]``."""
    start = perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + perf_counter() - start
