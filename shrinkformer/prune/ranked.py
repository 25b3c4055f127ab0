"""Methods that rank heads and neurons by the activations of the dense model, then correct what consumes them."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from shrinkformer.architectures import LayerView, Projection, layer_views, unit_columns
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.choices import Choice, layer_plan, read_choices, write_choices
from shrinkformer.prune.guarded import prune_limited
from shrinkformer.prune.methods import LayerRanking, Method, get_method
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.plan import LayerPlan, Plan
from shrinkformer.prune.refit import Consumer, correct_consumer, slice_consumer
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import Pruned, timed
from shrinkformer.prune.resume import WeightFiles
from shrinkformer.prune.statistics import Batches, LayerMoments, Progress, Statistics, stream_statistics
from shrinkformer.prune.stream import BlockStream
from shrinkformer.prune.surgery import remove_heads, remove_neurons, with_blocks
from shrinkformer.prune.uniform import Losses, allocate_alike


@dataclass(frozen=True)
class Ranked:
    """A model with everything that was learnt about it; :meth:`prune` takes any budget.

    Attributes:
        model: The dense model, in evaluation mode; never changed.
        batches: The calibration examples as model inputs.
        method: The pruning method.
        seed: Seed of random methods, recorded in plans.
        statistics: Second moments, or None where the method needs none.
        rankings: One per block.
        resources: Where weights come from, where data goes, who shares the work.
        seconds: Time of calibration and selection.
    """

    model: PreTrainedModel
    batches: Batches
    method: Method
    seed: int
    statistics: Statistics | None
    rankings: tuple[LayerRanking, ...]
    resources: Resources = field(default_factory=Resources)
    seconds: dict[str, float] = field(default_factory=dict)

    def allocate(self, budget: Budget) -> Counts:
        """How many heads and neurons every block keeps.

        Raises:
            BudgetError: The budget is below what every block must keep.
            InputError: No sizes that all blocks may have alike fit the budget.
        """
        costs = CostModel.of(layer_views(self.model), budget)
        if not budget.uniform:
            return self.method.allocate(self.rankings, costs)
        heads, neurons = ([getattr(rank, part).tails for rank in self.rankings] for part in ("heads", "neurons"))
        return allocate_alike(costs, Losses.relative(heads, neurons))

    def prune(self, budget: Budget) -> Pruned:
        """A smaller copy of the model, in memory, that meets a budget.

        Raises:
            BudgetError: The budget is below what every block must keep.
            NumericalError: What was made computes NaN or infinity on the examples.
            OutOfMemoryError: There is not enough memory even for one example at a time.
        """
        return prune_limited(self, lambda limited: limited._prune(budget))

    def _prune(self, budget: Budget) -> Pruned:
        seconds: dict[str, float] = {}
        with timed(seconds, "allocation"):
            counts = self.allocate(budget)
        with timed(seconds, "refit"):
            config = copy.deepcopy(self.model.config)
            finished = self.resources.ledger.blocks(budget, self.method.name)
            views, layers = zip(*self.prune_blocks(counts, config, finished), strict=True)
            model = with_blocks(self.model, [view.block for view in views], config)
        plan = self.plan(budget, counts, layers)
        describe_sizes(model, plan)
        return Pruned(model, plan, seconds)

    def plan(self, budget: Budget, counts: Counts, layers: Sequence[LayerPlan]) -> Plan:
        """The plan that :meth:`prune_blocks` carried out."""
        costs = CostModel.of(layer_views(self.model), budget)
        return Plan(
            method=self.method.name,
            mu=budget.mu,
            seed=self.seed,
            sequence_length=budget.sequence_length,
            dense_macs=costs.dense,
            macs=costs.macs(counts),
            layers=tuple(layers),
        )

    @torch.no_grad()
    def prune_blocks(
        self, counts: Counts, config: PreTrainedConfig, finished: WeightFiles | None = None
    ) -> Iterator[tuple[LayerView, LayerPlan]]:
        """Smaller copies of the blocks, first to last; only one of them needs to be in memory at a time.

        Args:
            counts: How many heads and neurons every block keeps.
            config: The configuration that the copies refer to.
            finished: Keeps what replaces the consumers of finished blocks, and gives back that of an interrupted run.

        As published: neurons are refitted on what they compute in the dense model; heads are ordered and refitted on
        what they compute in the model without the removed neurons, and only how many of them each block keeps was
        settled on the dense model.
        """
        stream = None
        if self.statistics is not None:
            stream = BlockStream(self.model, self.resources.workers.share(self.batches), self.resources.offload)
        for dense in layer_views(self.model):
            with self.resources.weights.resident(dense.index):
                view = replace(dense, block=copy.deepcopy(dense.block, {id(self.model.config): config}))
            yield view, self._prune_block(view, counts, stream, finished)

    def _prune_block(
        self, view: LayerView, counts: Counts, stream: BlockStream | None, finished: WeightFiles | None
    ) -> LayerPlan:
        """Make a block smaller, in place, and send the examples through it, all its heads still there."""
        index, workers = view.index, self.resources.workers
        known = None
        if finished is not None and workers.broadcast(finished.holds(index)):
            known = read_choices(finished, view)
        neurons = self._choose_neurons(view, counts.neurons[index]) if known is None else known[1]
        if len(neurons.kept) < view.neurons:
            remove_neurons(view, neurons.kept, neurons.consumer)
        heads = self._choose_heads(view, counts.heads[index], stream) if known is None else known[0]
        if known is not None and stream is not None:
            stream.run(view.block)
        if known is None and finished is not None:
            if workers.is_main:
                write_choices(finished, view, heads, neurons)
            workers.barrier()
        if len(heads.kept) < view.heads:
            remove_heads(view, heads.kept, heads.consumer)
        return layer_plan(heads, neurons)

    def _choose_neurons(self, view: LayerView, count: int) -> Choice:
        moments = self.statistics.of(view).neurons if self.statistics and count < view.neurons else None
        linear = view.feed_forward_output
        kept = _best(self.rankings[view.index].neurons.order, count, linear.weight.device)
        return Choice(kept, self._consumer(linear, moments, kept))

    def _choose_heads(self, view: LayerView, count: int, stream: BlockStream | None) -> Choice:
        order, moments, linear = self.rankings[view.index].heads.order, None, view.attention_output
        if stream is not None:
            moments = Moments.zeros(linear.in_features, linear.weight.device)
            stream.run(view.block, {linear.module: moments.update})
            moments.all_reduce()
            order = self.method.rank_heads(view, moments, self.seed).order
        kept = _best(order, count, linear.weight.device)
        return Choice(kept, self._consumer(linear, moments, unit_columns(kept, view.head_width)))

    def _consumer(self, linear: Projection, moments: Moments | None, kept: Tensor) -> Consumer:
        if moments is None or len(kept) == linear.in_features:
            return slice_consumer(linear, kept)
        return correct_consumer(linear, moments, kept, self.method.correction)


def rank_units(
    model: PreTrainedModel,
    batches: Batches,
    *,
    method: str,
    seed: int = 0,
    progress: Progress = iter,
    resources: Resources | None = None,
    moments: Sequence[tuple[LayerView, LayerMoments]] | None = None,
) -> Ranked:
    """Learn what a ranking method needs to prune to any budget; arguments and errors are those of ``calibrate``.

    ``moments`` are those of all blocks on the same examples, where they are known already.
    """
    chosen, resources = get_method(method), resources or Resources()
    assert resources.offload is None or resources.store is not None, "offloaded moments need a store"
    model.eval()
    seconds = {"calibration": 0.0, "selection": 0.0}
    statistics = Statistics(resources.store) if chosen.needs_statistics else None
    rankings = []
    began = perf_counter()
    with torch.no_grad():
        for view, found in moments or _learn(model, batches, resources, progress, chosen):
            with timed(seconds, "selection"):
                rankings.append(rank_block(chosen, view, found, seed))
            if statistics is not None and found is not None and resources.offload is None:
                statistics.layers[view.index] = found
    seconds["calibration"] = perf_counter() - began - seconds["selection"]
    return Ranked(model, batches, chosen, seed, statistics, tuple(rankings), resources, seconds)


def _learn(
    model: PreTrainedModel, batches: Batches, resources: Resources, progress: Progress, method: Method
) -> Iterator[tuple[LayerView, LayerMoments | None]]:
    """Every block with its weights on the device, and with its moments where the method wants them."""
    if method.needs_statistics:
        yield from stream_statistics(model, batches, resources, progress=progress)
        return
    for view in progress(layer_views(model)):
        with resources.weights.resident(view.index):
            yield view, None


def rank_block(method: Method, view: LayerView, moments: LayerMoments | None, seed: int) -> LayerRanking:
    """Rank the heads and neurons of a block."""
    return LayerRanking(
        heads=method.rank_heads(view, moments.heads if moments else None, seed),
        neurons=method.rank_neurons(view, moments.neurons if moments else None, seed),
    )


def _best(order: NDArray[np.int64], count: int, device: torch.device) -> Tensor:
    """The first indices of an order, ascending."""
    return torch.as_tensor(np.sort(order[:count]), device=device)
