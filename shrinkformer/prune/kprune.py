"""The method ``kprune``: one sublayer after the other loses what knows least for its MACs, and is refitted at once."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.errors import NumericalError
from shrinkformer.prune.allocation import allocate_at_threshold, require_feasible
from shrinkformer.prune.budget import Budget, CostModel
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.divergence import Target
from shrinkformer.prune.fisher import TOKENS, log_likelihood
from shrinkformer.prune.guarded import prune_limited
from shrinkformer.prune.masks import (
    Loss,
    Part,
    mask_gradients,
    paired_blocks,
    parts_of,
    plan_of,
    relative_error,
    wanted_outputs,
)
from shrinkformer.prune.names import KPRUNE, require_method
from shrinkformer.prune.objective import Objective, Predictions, objective_of, predicts_words
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import Pruned, timed
from shrinkformer.prune.samples import spread
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.prune.stream import token_rows
from shrinkformer.utils.inputs import outputs_of, token_mask
from shrinkformer.utils.parallel import Workers

_TEMPERATURE = 2.0  # as published
_REPRESENTATION = 1.0  # how much all representational knowledge counts beside all predictive knowledge
_RIDGE = 1e-6  # what rounding asks for: directions that no example shows keep their weights

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Knowledge:
    """What the heads and neurons of some parts of a model know, of any scale.

    Attributes:
        predictive: For each part, squared gradients of its masks, summed over examples, ``(units,)``.
        representational: For each part, squared norms of what its units add to the output of the sublayer, summed over
            tokens, ``(units,)``.
    """

    predictive: Sequence[Scores]
    representational: Sequence[Scores]

    def importance(self, parts: Sequence[Part], costs: CostModel) -> list[Scores]:
        """Importance of every unit, for its MACs.

        Published scores add the two kinds with a factor that depends on task and model (2.5e-4 for one of them). Here
        each kind is divided by its sum over all parts first, so that one factor serves, and so that it does not matter
        how far the model already is from the dense one, which scales all predictive knowledge. Published, too: heads
        count 64 times. With these sums that leaves hardly a neuron at small budgets, and up to three times the
        divergence, so heads count once.
        """
        shares = []
        for kind in (self.predictive, self.representational):
            total = max(sum(float(part.sum()) for part in kind), np.finfo(np.float64).tiny)
            shares.append([part / total for part in kind])
        return [
            (known + _REPRESENTATION * shown) / (costs.head(part.view.index) if part.heads else costs.neuron)
            for known, shown, part in zip(*shares, parts, strict=True)
        ]


@dataclass(frozen=True)
class KPrune:
    """A model with the knowledge of its heads and neurons; :meth:`prune` takes any budget.

    From the first sublayer to the last: knowledge is measured on the model as pruned so far, one threshold over the
    sublayers that are left says what the next one loses, and its consumer is fitted to give what the dense model has
    behind that sublayer, residual stream included. Every block keeps what the budget says it must.

    Predictive knowledge is the squared gradient of the divergence from the dense model. Until something is pruned that
    is zero, and the published score holds representational knowledge only; here the gradient of the log-likelihood of
    answers drawn from the model's own predictions takes its place, whose squares are what a divergence would grow by.

    Attributes:
        model: The dense model, in evaluation mode; never changed.
        batches: The calibration examples as model inputs.
        objective: What the model predicts.
        seed: Of the drawn answers.
        knowledge: Of the dense model.
        resources: Who shares the work.
        progress: Wraps the loop over the blocks.
        seconds: Time of calibration.

    Source:
        Park et al., "Accurate retraining-free pruning for pretrained encoder-based language models", arXiv 2308.03449.
        Knowledge is measured on 16 thousand tokens at most, there on 100 thousand, which takes as many passes.
    """

    model: PreTrainedModel
    batches: Batches
    objective: Objective
    seed: int
    knowledge: Knowledge
    resources: Resources
    progress: Progress = iter
    seconds: dict[str, float] = field(default_factory=dict)

    def prune(self, budget: Budget) -> Pruned:
        """A smaller copy of the model, in memory, that meets a budget.

        Raises:
            BudgetError: The budget is below what every block must keep.
            InputError: The budget asks for blocks that are all alike.
        """
        return prune_limited(self, lambda limited: limited._prune(budget))

    def _prune(self, budget: Budget) -> Pruned:
        require_method(KPRUNE, uniform=budget.uniform)
        seconds: dict[str, float] = {}
        costs = CostModel.of(layer_views(self.model), budget)
        require_feasible(costs)
        with timed(seconds, "refit"):
            model = copy.deepcopy(self.model)
            kept, errors = self._prune_in_turn(model, costs)
        plan = plan_of(KPRUNE, costs, self.seed, kept, errors)
        describe_sizes(model, plan)
        return Pruned(model, plan, seconds)

    @torch.no_grad()
    def _prune_in_turn(self, model: PreTrainedModel, costs: CostModel) -> tuple[list[list[int]], list[float]]:
        """Prune a copy of the model, in place; gives what each part keeps and the relative error of its sublayer."""
        workers, kept, errors, changed = self.resources.workers, list[list[int]](), list[float](), False
        examples = workers.share(spread(self.batches, TOKENS))
        loss = _divergence_from(self.model, examples, self.objective)
        every, share = parts_of(layer_views(model)), workers.share(self.batches)
        for parts, dense, passes in paired_blocks(self.model, layer_views(model), share, self.progress):
            for part in parts:
                left = every[len(kept) :]
                knowledge = measure(model, left, examples, loss, workers) if changed else self._dense(len(kept))
                units = _choose(knowledge.importance(left, costs), kept, costs)
                changed = changed or len(units) < part.units
                part.remove_all_but(torch.from_numpy(units))
                kept.append(units.tolist())
                errors.append(0.0)
                if changed:
                    sums = wanted_outputs(part, passes, dense, workers)
                    weight = sums.centred(intercept=False).solve(part.consumer.weight.double().T, _RIDGE)
                    part.consumer.weight.copy_(weight.T)
                    errors[-1] = relative_error(sums, weight)
        return kept, errors

    def _dense(self, start: int) -> Knowledge:
        """Knowledge of the parts from ``start`` on, in the dense model."""
        return Knowledge(self.knowledge.predictive[start:], self.knowledge.representational[start:])


def _choose(importance: Sequence[Scores], kept: Sequence[Sequence[int]], costs: CostModel) -> NDArray[np.int64]:
    """What stays of the first of the parts that are left, ascending, when all of them are cut at one threshold."""
    settled = [np.full(len(units), np.inf) for units in kept]
    scores = settled + [np.sort(part)[::-1] for part in importance]
    counts = allocate_at_threshold(costs, scores[::2], scores[1::2])
    sizes = [size for pair in zip(counts.heads, counts.neurons, strict=True) for size in pair]
    return np.sort(np.argsort(-importance[0], kind="stable")[: sizes[len(kept)]])


def measure(model: PreTrainedModel, parts: Sequence[Part], batches: Batches, loss: Loss, workers: Workers) -> Knowledge:
    """Measure knowledge on a model as it is.

    Args:
        model: In evaluation mode; nothing is changed.
        parts: Of the model.
        batches: Examples of this worker.
        loss: Whose gradients are squared, those of each example by themselves.
        workers: Share the examples; all of them get the sums.

    Raises:
        NumericalError: The model computes NaN or infinity on the examples.
    """
    device = model.device
    kinds = [[torch.zeros(part.units, dtype=torch.float64, device=device) for part in parts] for _ in range(2)]
    for batch, found in zip(batches, mask_gradients(model, parts, batches, loss), strict=True):
        mask = token_mask(batch).to(device)
        for place, part in enumerate(parts):
            kinds[0][place] += found.masks[place].double().square().sum(0)
            kinds[1][place] += contributions(part, token_rows(found.inputs[place], mask))
    workers.sum_(*kinds[0], *kinds[1])
    if not all(bool(torch.isfinite(values).all()) for kind in kinds for values in kind):
        raise NumericalError("the model computes NaN or infinity on the examples; use another checkpoint.")
    predictive, representational = ([values.cpu().numpy() for values in kind] for kind in kinds)
    return Knowledge(predictive, representational)


@torch.no_grad()
def contributions(part: Part, rows: Tensor) -> Tensor:
    """Squared norms of what each unit makes of rows ``(tokens, inputs)`` of its consumer's input, ``(units,)``."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    inputs, weights = (each.to(dtype).reshape(-1, part.units, part.width) for each in (rows, part.consumer.weight))
    second, metric = (torch.einsum("tui,tuj->uij", each, each).double() for each in (inputs, weights))
    return (second * metric).sum((1, 2))


def _divergence_from(model: PreTrainedModel, batches: Batches, objective: Objective) -> Loss:
    """The divergence of a model's predictions from those of the dense one, both softened."""
    known: dict[int, Target] = {}

    def wanted(index: int) -> Target:
        if index in known:
            return known[index]
        with torch.no_grad():
            output = outputs_of(model, batches[index])
        found = Target(softened(objective.predictions(output, masks[index])))
        if not predicts_words(model):  # such predictions take more room than time
            known[index] = found
        return found

    masks = [token_mask(batch).to(model.device) for batch in batches]
    return lambda output, index: wanted(index).divergence(softened(objective.predictions(output, masks[index])))


def softened(found: Predictions, temperature: float = _TEMPERATURE) -> Predictions:
    """Distributions at a higher temperature; numbers stay as they are."""
    if not found.distribution:
        return found
    return Predictions(tuple(torch.log_softmax(part / temperature, -1) for part in found.parts), distribution=True)


def learn_kprune(
    model: PreTrainedModel,
    batches: Batches,
    *,
    objective: Objective | None = None,
    seed: int = 0,
    progress: Progress = iter,
    resources: Resources | None = None,
) -> KPrune:
    """Measure the knowledge of the dense model, which serves any budget.

    Args:
        model: Any model with an architecture record, in memory as a whole.
        batches: Model inputs with an ``attention_mask``; labels are not needed.
        objective: What the model predicts; by default what its own head does.
        seed: Of the answers that are drawn from the model's predictions.
        progress: Wraps loops over the blocks.
        resources: Who shares the work.

    Raises:
        UnsupportedModelError: There is no architecture record for the model.
        NumericalError: The model computes NaN or infinity on the examples.
    """
    resources, seconds = resources or Resources(), dict[str, float]()
    model.eval()
    settled = (objective or objective_of(model)).scaled(model, batches, resources.workers)
    examples = resources.workers.share(spread(batches, TOKENS))
    generator = torch.Generator(model.device).manual_seed(seed)

    def loss(output: object, index: int) -> Tensor:
        return log_likelihood(output, examples[index], generator, settled)

    with timed(seconds, "calibration"):
        knowledge = measure(model, parts_of(layer_views(model)), examples, loss, resources.workers)
    return KPrune(model, batches, settled, seed, knowledge, resources, progress, seconds)
