"""The method ``kwon``: squared gradients of masks, a search under exact MACs, one scalar for every unit that stays."""

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
from shrinkformer.prune.allocation import allocate_for_most
from shrinkformer.prune.budget import Budget, CostModel
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.fisher import log_likelihood
from shrinkformer.prune.guarded import prune_limited
from shrinkformer.prune.masks import (
    Part,
    mask_gradients,
    paired_blocks,
    parts_of,
    plan_of,
    relative_error,
    wanted_outputs,
)
from shrinkformer.prune.names import KWON
from shrinkformer.prune.objective import Objective, objective_of
from shrinkformer.prune.regression import Sums
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import Pruned, timed
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.prune.uniform import Losses, allocate_alike

_MINI_BATCH = 32  # examples that share one gradient, as published
_DAMP = 1.0  # of the least squares, as published
_LARGEST_SCALE = 10.0  # beyond it tuning stops, as published


@dataclass(frozen=True)
class Kwon:
    """A model with the gradients of its masks; :meth:`prune` takes any budget.

    The published method needs labels. Here, as everywhere in this package, answers are drawn from the model's own
    predictions, so that squared gradients are the Fisher information itself, not its empirical stand-in. What published
    code only masks is removed here, and scalars go into the weights of the consumers. Every block keeps what the budget
    says it must.

    Attributes:
        model: The dense model, in evaluation mode; never changed.
        batches: The calibration examples as model inputs.
        seed: Of the drawn answers.
        gradients: For the heads and the neurons of each block in turn, ``(mini-batches, units)`` float64.
        resources: Who shares the work.
        progress: Wraps the loop over the blocks.
        seconds: Time of calibration.

    Source:
        Kwon et al., "A fast post-training pruning framework for transformers", arXiv 2204.09656.
    """

    model: PreTrainedModel
    batches: Batches
    seed: int
    gradients: Sequence[Tensor]
    resources: Resources
    progress: Progress = iter
    seconds: dict[str, float] = field(default_factory=dict)

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
        costs = CostModel.of(layer_views(self.model), budget)
        with timed(seconds, "allocation"):
            kept = search_masks(self.gradients, costs)
        with timed(seconds, "refit"):
            model = copy.deepcopy(self.model)
            parts = parts_of(layer_views(model))
            fewer = [len(units) < part.units for part, units in zip(parts, kept, strict=True)]
            for part, units in zip(parts, kept, strict=True):
                part.remove_all_but(torch.from_numpy(units))
            errors = self._tune(model, fewer.index(True)) if any(fewer) else [0.0] * len(parts)
        plan = plan_of(KWON, costs, self.seed, [units.tolist() for units in kept], errors)
        describe_sizes(model, plan)
        return Pruned(model, plan, seconds)

    @torch.no_grad()
    def _tune(self, model: PreTrainedModel, start: int) -> list[float]:
        """Scale what stays, one part after the other from ``start`` on, in place; gives the sublayers' errors."""
        workers, errors, sane = self.resources.workers, list[float](), True
        share = workers.share(self.batches)
        for parts, dense, passes in paired_blocks(self.model, layer_views(model), share, self.progress):
            for part in parts:
                if len(errors) < start:  # its inputs are the dense model's, and so is its output
                    errors.append(0.0)
                    continue
                sums = wanted_outputs(part, passes, dense, workers)
                sane = sane and _tune_part(part, sums)
                errors.append(relative_error(sums, part.consumer.weight.double().T))
        return errors


def search_masks(gradients: Sequence[Tensor], costs: CostModel) -> list[NDArray[np.int64]]:
    """What stays of each part, ascending: at first each for its own squared gradient, then together.

    Raises:
        BudgetError: The budget is below what every block must keep.

    Source:
        Kwon et al., sections 4.1 and 4.2.
    """
    norms = [np.asarray(part.norm(dim=0)) for part in gradients]
    orders = [np.argsort(-norm, kind="stable") for norm in norms]
    scores = [norm[order] for norm, order in zip(norms, orders, strict=True)]
    if costs.budget.uniform:
        tails = [np.append(np.square(part)[::-1].cumsum()[::-1], 0.0) for part in scores]
        counts = allocate_alike(costs, Losses(tails[::2], tails[1::2]))
    else:
        counts = allocate_for_most(costs, scores[::2], scores[1::2])
    sizes = [size for pair in zip(counts.heads, counts.neurons, strict=True) for size in pair]
    return [
        rearranged(np.asarray(part), order[:size]) for part, order, size in zip(gradients, orders, sizes, strict=True)
    ]


def rearranged(gradients: NDArray[np.float64], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """As many units, exchanged where that lowers the loss of taking all others away at once, ascending.

    The loss is the squared norm of the sum of their gradients: Fisher information with its cross terms. Each unit that
    goes is exchanged once at most, the most important one first, for the unit that helps most.

    Args:
        gradients: ``(mini-batches, units)``.
        kept: Units that stay.
    """
    squares = np.square(gradients).sum(axis=0)
    stays = np.zeros(gradients.shape[1], dtype=bool)
    stays[kept] = True
    gone = np.flatnonzero(~stays)
    total = gradients[:, gone].sum(axis=1)
    for unit in gone[np.argsort(-squares[gone], kind="stable")] if len(kept) else gone[:0]:
        candidates = np.flatnonzero(stays)
        without = total - gradients[:, unit]
        losses = squares[candidates] + 2 * without @ gradients[:, candidates] + without @ without
        other = candidates[losses.argmin()]
        if losses.min() < total @ total:
            stays[unit], stays[other] = True, False
            total = without + gradients[:, other]
    return np.flatnonzero(stays)


def _tune_part(part: Part, sums: Sums) -> bool:
    """Scale the units of a part, unless one would be scaled out of all proportion; says whether that went well."""
    weight = part.consumer.weight
    scales = unit_scales(sums, weight.double(), part.width)
    if not float(scales.abs().max()) <= _LARGEST_SCALE:
        return False
    weight.mul_(scales.repeat_interleave(part.width))
    return True


def unit_scales(sums: Sums, weight: Tensor, width: int, damp: float = _DAMP) -> Tensor:
    """Scalars, one for each unit, that bring an output nearest to what is wanted; damping holds them towards one.

    Args:
        sums: Of inputs and wanted outputs.
        weight: Of the consumer, ``(outputs, inputs)`` float64.
        width: Inputs that belong to one unit.
        damp: The squared distance of the scalars from one counts as the square of this.

    Returns:
        ``(units,)`` float64.

    Source:
        Kwon et al., section 4.3, towards what the dense model computes in the sublayer's place.
    """
    units = weight.shape[1] // width
    normal = (sums.second * (weight.T @ weight)).reshape(units, width, units, width).sum((1, 3))
    right = (sums.cross * weight.T).reshape(units, -1).sum(1) - normal.sum(1)
    damping = damp**2 * torch.eye(units, dtype=normal.dtype, device=normal.device)
    scales: Tensor = 1 + torch.linalg.solve(normal + damping, right)
    return scales


def learn_kwon(
    model: PreTrainedModel,
    batches: Batches,
    *,
    objective: Objective | None = None,
    seed: int = 0,
    progress: Progress = iter,
    resources: Resources | None = None,
) -> Kwon:
    """Take the gradients of a model's masks, which serve any budget.

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
    share = resources.workers.share(batches)
    parts = parts_of(layer_views(model))
    generator = torch.Generator(model.device).manual_seed(seed)
    with timed(seconds, "calibration"):
        found = list[Tensor]()
        rows = torch.zeros(0, sum(part.units for part in parts), dtype=torch.float64)
        for batch in mask_gradients(
            model, parts, share, lambda output, index: log_likelihood(output, share[index], generator, settled)
        ):
            rows = torch.cat([rows, torch.cat(batch.masks, dim=1).double().cpu()])
            while len(rows) >= _MINI_BATCH:
                found.append(rows[:_MINI_BATCH].mean(0))
                rows = rows[_MINI_BATCH:]
        found += [rows.mean(0)] if len(rows) else []
        gradients = torch.stack(resources.workers.gather(found))
        if not bool(torch.isfinite(gradients).all()):
            raise NumericalError("the model computes NaN or infinity on the examples; use another checkpoint.")
    by_part = torch.split(gradients, [part.units for part in parts], dim=1)
    return Kwon(model, batches, seed, by_part, resources, progress, seconds)
