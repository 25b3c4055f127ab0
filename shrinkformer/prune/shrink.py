"""The method ``shrink``: sizes by what they do to the model's predictions, narrower heads, blocks refitted in turn."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.efficiency.macs import LayerSize, model_macs
from shrinkformer.prune.allocation import require_feasible
from shrinkformer.prune.budget import Budget, CostModel, layer_sizes
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.curves import QUERIES, BlockCurves, measure_curves, narrowable
from shrinkformer.prune.damage import FEW_TOKENS, Damage
from shrinkformer.prune.divergence import Judge
from shrinkformer.prune.guarded import prune_guarded
from shrinkformer.prune.latency_table import LatencyCosts, LatencyTable
from shrinkformer.prune.ledger import name_of
from shrinkformer.prune.levels import BlockLevels
from shrinkformer.prune.names import SHRINK
from shrinkformer.prune.objective import Objective, objective_of
from shrinkformer.prune.plan import LayerPlan, Plan, warn_of_surprise
from shrinkformer.prune.ranked import Ranked, rank_units
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import Pruned, timed
from shrinkformer.prune.samples import hold_out, together
from shrinkformer.prune.search import Search
from shrinkformer.prune.sensitivity import Sensitivity, learn_sensitivity
from shrinkformer.prune.sequential import RefitErrors, refit_blocks
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.statistics import Batches, Progress, stream_statistics
from shrinkformer.prune.stream import count_tokens
from shrinkformer.prune.surgery import with_blocks
from shrinkformer.utils.memory import limited

RIVAL = "stat"
"""The method that is taken where it does better."""

UNSEARCHED = f"{SHRINK}, first plan"
"""So is the plan from before the search: what is least damage before the refits need not be the least after them."""

PLENTY = 65_536
"""Tokens beyond which an eighth more is not worth another fit."""


@dataclass(frozen=True)
class Shrinker:
    """A model with everything that was learnt about it; :meth:`prune` takes any budget.

    Attributes:
        model: The dense model, in evaluation mode; never changed.
        batches: The calibration examples as model inputs, without those that were set aside.
        aside: Those.
        config: Choices of the method.
        objective: What the model predicts.
        seed: Of the answers that are drawn from the model's predictions.
        sensitivity: How much errors matter; weights of tokens are those of ``batches``, then of ``aside``.
        levels: Smaller versions of each block.
        curves: What they do to predictions.
        damage: Measures that.
        rival: A method that knows less, in case it does better.
        judge: Says so, by the examples that were set aside.
        latency: Budgets are fractions of this time, not of MACs.
        resources: Who shares the work.
        progress: Wraps loops over the blocks.
        seconds: Time of calibration and selection.
    """

    model: PreTrainedModel
    batches: Batches
    aside: Batches
    config: ShrinkConfig
    objective: Objective
    seed: int
    sensitivity: Sensitivity
    levels: Sequence[BlockLevels]
    curves: Sequence[BlockCurves]
    damage: Damage
    rival: Ranked
    judge: Judge
    latency: LatencyTable | None
    resources: Resources
    progress: Progress = iter
    seconds: dict[str, float] = field(default_factory=dict)

    def prune(self, budget: Budget) -> Pruned:
        """A smaller copy of the model, in memory, that meets a budget.

        Raises:
            BudgetError: The budget is below what every block must keep.
            NumericalError: What was made computes NaN or infinity on the examples.
            OutOfMemoryError: There is not enough memory even for one example at a time.

        Warns:
            ShrinkformerWarning: On examples set aside the model is much further from the dense one than predicted.
        """
        pruned = self._guarded(lambda most: self._limited(most)._prune(budget))
        warn_of_surprise(pruned.plan)
        return pruned

    def _guarded(self, prune: Callable[[int], Pruned]) -> Pruned:
        return prune_guarded(prune, self.model, together(self.batches, self.aside), self.resources)

    def _limited(self, most: int) -> "Shrinker":
        """The same with smaller batches."""
        batches = limited(self.batches, most)
        aside = batches if self.aside is self.batches else limited(self.aside, most)
        if batches is self.batches and aside is self.aside:
            return self
        workers = self.resources.workers
        return replace(
            self,
            batches=batches,
            aside=aside,
            sensitivity=self.sensitivity.split(together(batches, aside)),
            damage=Damage(self.model, batches, self.objective, workers),
            judge=Judge(self.model, aside, self.objective, workers),
            rival=replace(self.rival, batches=batches),
        )

    def _prune(self, budget: Budget) -> Pruned:
        seconds: dict[str, float] = {}
        costs = self._costs(budget)
        with timed(seconds, "allocation"):
            search = Search(
                self.levels,
                self.curves,
                self.damage,
                costs,
                seconds=self.config.search_seconds,
                say=self.config.say,
                workers=self.resources.workers,
                values=self.resources.ledger.values,
            )
            found = search.run()
        plans = {SHRINK: found.sizes} if found.first == found.sizes else {SHRINK: found.sizes, UNSEARCHED: found.first}
        with timed(seconds, "refit"):
            candidates = {name: self._refitted(costs, sizes, self.batches, name) for name, sizes in plans.items()}
        with timed(seconds, "safety"):
            if self.latency is None:
                candidates[RIVAL] = self.rival.prune(budget)
            divergences = {name: self._judged(budget, name, made.model) for name, made in candidates.items()}
        shown = ", ".join(f"{name} {value:.5f}" for name, value in divergences.items())
        self.config.say(f"divergence on examples set aside: {shown}")
        name = min(divergences, key=divergences.__getitem__)
        best = candidates[name]
        uniform = search.cost_of_uniformity(layer_sizes(layer_views(best.model))) if budget.uniform else {}
        if name in plans and self._are_few:  # those that have judged help now
            with timed(seconds, "refit"):
                best = self._refitted(costs, plans[name], together(self.batches, self.aside), f"{name}, all examples")
        prediction = {"predicted": found.predicted, "measured": divergences[name]}
        searched = {"cut_short": 1.0} if found.cut_short else {}
        plan = replace(best.plan, divergences=divergences, uniform=uniform, prediction=prediction, search=searched)
        return Pruned(best.model, plan, seconds)

    def prune_to(self, sizes: Sequence[LayerSize], sequence_length: float) -> Pruned:
        """A smaller copy of the model, in memory, with blocks of given sizes.

        Args:
            sizes: Of each block.
            sequence_length: Length in tokens at which MACs are counted, for the plan.

        Raises:
            NumericalError: What was made computes NaN or infinity on the examples.
            OutOfMemoryError: There is not enough memory even for one example at a time.
        """
        return self._guarded(lambda most: self._limited(most)._prune_to(sizes, sequence_length))

    def _prune_to(self, sizes: Sequence[LayerSize], sequence_length: float) -> Pruned:
        costs = CostModel.of(layer_views(self.model), Budget(1.0, sequence_length))
        mu = model_macs(sizes, costs.hidden_size, sequence_length) / costs.dense
        seconds: dict[str, float] = {}
        with timed(seconds, "refit"):
            costs = replace(costs, budget=Budget(mu, sequence_length))
            pruned = self._refitted(costs, sizes, together(self.batches, self.aside), "sizes that were given")
        return Pruned(pruned.model, pruned.plan, seconds)

    @property
    def _are_few(self) -> bool:
        """Whether a fit gains from the examples that were set aside."""
        return self.aside is not self.batches and count_tokens(self.batches) < PLENTY

    def _costs(self, budget: Budget) -> CostModel:
        costs = CostModel.of(layer_views(self.model), budget)
        if self.latency is None:
            require_feasible(costs)
            return costs
        timed_costs = LatencyCosts(
            costs.layers, costs.hidden_size, budget, costs.pre_norm, costs.head_counts, table=self.latency
        )
        timed_costs.require_feasible()
        return timed_costs

    def _judged(self, budget: Budget, name: str, model: PreTrainedModel) -> float:
        """Divergence on the examples that were set aside."""
        return self.resources.ledger.values.value(f"set aside, {name_of(budget)}, {name}", lambda: self.judge.of(model))

    def _refitted(self, costs: CostModel, sizes: Sequence[LayerSize], batches: Batches, name: str) -> Pruned:
        """A model of these sizes, fitted to some examples; its blocks are kept under a name as they are finished."""
        model = self._assembled(sizes)
        errors = refit_blocks(
            self.model,
            layer_views(model),
            batches,
            self.sensitivity,
            workers=self.resources.workers,
            progress=self.progress,
            finished=self.resources.ledger.blocks(costs.budget, name),
        )
        plan = self._plan(costs, sizes, errors)
        describe_sizes(model, plan)
        return Pruned(model, plan, {})

    def _assembled(self, sizes: Sequence[LayerSize]) -> PreTrainedModel:
        """A copy of the model with smaller blocks."""
        config = copy.deepcopy(self.model.config)
        blocks = [level.build(size, config).block for level, size in zip(self.levels, sizes, strict=True)]
        return with_blocks(self.model, blocks, config)

    def _plan(self, costs: CostModel, sizes: Sequence[LayerSize], errors: Sequence[RefitErrors]) -> Plan:
        layers = []
        for level, size, error in zip(self.levels, sizes, errors, strict=True):
            narrow = (size.query_width, size.value_width) != (level.size.query_width, level.size.value_width)
            layers.append(
                LayerPlan(
                    heads=tuple(level.kept_heads(size.heads).tolist()),
                    neurons=tuple(level.kept_neurons(size.neurons).tolist()),
                    attention_error=error.attention,
                    ffn_error=error.feed_forward,
                    query_width=size.query_width if narrow else 0,
                    value_width=size.value_width if narrow else 0,
                )
            )
        return Plan(
            method=SHRINK,
            mu=costs.budget.mu,
            seed=self.seed,
            sequence_length=costs.budget.sequence_length,
            dense_macs=model_macs(costs.layers, costs.hidden_size, costs.budget.sequence_length),
            macs=model_macs(sizes, costs.hidden_size, costs.budget.sequence_length),
            layers=tuple(layers),
            budget="macs" if self.latency is None else "latency",
        )


def learn(
    model: PreTrainedModel,
    batches: Batches,
    config: ShrinkConfig | None = None,
    *,
    objective: Objective | None = None,
    seed: int = 0,
    progress: Progress = iter,
    resources: Resources | None = None,
) -> Shrinker:
    """Learn everything about a model that pruning it to any budget needs.

    Args:
        model: Any model with an architecture record, in memory as a whole.
        batches: Model inputs with an ``attention_mask``; labels are not needed.
        config: Choices of the method.
        objective: What the model predicts; by default what its own head does.
        seed: Of the answers that are drawn from the model's predictions.
        progress: Wraps loops over the blocks.
        resources: Who shares the work, and what is known from an interrupted run.

    Raises:
        UnsupportedModelError: There is no architecture record for the model.
        NumericalError: The model computes NaN or infinity on the examples.
    """
    config, resources = config or ShrinkConfig(), resources or Resources()
    model.eval()
    began, workers = perf_counter(), resources.workers
    objective = (objective or objective_of(model)).scaled(model, batches, workers)
    seconds: dict[str, float] = {}
    levels = []
    batches, aside = hold_out(batches)
    narrow = () if config.whole_heads else narrowable(layer_views(model)[0])
    with torch.no_grad():
        moments = stream_statistics(model, batches, resources, progress=progress, inputs=QUERIES in narrow)
        found = [(view, of_block) for view, of_block in moments]
    sensitivity = learn_sensitivity(model, together(batches, aside), objective=objective, seed=seed, workers=workers)
    for view, of_block in found:
        levels.append(BlockLevels(view, of_block.heads, of_block.neurons, of_block.inputs, sensitivity, model.config))
    seconds["calibration"] = perf_counter() - began
    with timed(seconds, "selection"):
        few = Damage(model, batches, objective, workers, tokens=FEW_TOKENS)
        curves = measure_curves(
            levels, few, whole_heads=config.whole_heads, progress=progress, values=resources.ledger.values
        )
        damage = Damage(model, batches, objective, workers)
        judge = Judge(model, aside, objective, workers)
        latency = LatencyTable.measure(model, config.latency_shape, narrow=narrow) if config.latency_shape else None
        shared = Resources(workers=workers, ledger=resources.ledger)
        rival = rank_units(model, batches, method=RIVAL, seed=seed, resources=shared, moments=found)
    return Shrinker(
        model=model,
        batches=batches,
        aside=aside,
        config=config,
        objective=objective,
        seed=seed,
        sensitivity=sensitivity,
        levels=levels,
        curves=curves,
        damage=damage,
        rival=rival,
        judge=judge,
        latency=latency,
        resources=resources,
        progress=progress,
        seconds=seconds,
    )
