"""Prune a model: calibrate once, then produce a smaller model for any budget."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from transformers import PreTrainedModel

from shrinkformer.prune.budget import Budget
from shrinkformer.prune.columns import warn_of_few_tokens
from shrinkformer.prune.guarded import learn_guarded
from shrinkformer.prune.kprune import learn_kprune
from shrinkformer.prune.kwon import learn_kwon
from shrinkformer.prune.methods import is_fitted
from shrinkformer.prune.names import DEFAULT_METHOD, KPRUNE, KWON, SHRINK, require_method
from shrinkformer.prune.objective import Objective
from shrinkformer.prune.ranked import rank_units
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.shrink import learn
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.prune.stream import count_tokens
from shrinkformer.utils.inputs import padded_right


class Calibrated(Protocol):
    """A model with everything that was learnt about it."""

    @property
    def model(self) -> PreTrainedModel:
        """The dense model, in evaluation mode; never changed."""

    @property
    def seconds(self) -> dict[str, float]:
        """Time of calibration and selection."""

    def prune(self, budget: Budget) -> Pruned:
        """A smaller copy of the model, in memory, that meets a budget.

        Raises:
            BudgetError: The budget is below what every block must keep.
        """


def calibrate(
    model: PreTrainedModel,
    batches: Batches,
    *,
    method: str = DEFAULT_METHOD,
    seed: int = 0,
    progress: Progress = iter,
    resources: Resources | None = None,
    config: ShrinkConfig | None = None,
    objective: Objective | None = None,
) -> Calibrated:
    """Learn everything about a model that pruning it to any budget needs.

    Args:
        model: Any model with an architecture record, in any floating-point type.
        batches: Model inputs with an ``attention_mask``; labels are not needed.
        method: Name of a pruning method, one of ``METHOD_NAMES``.
        seed: Seed of what is drawn at random.
        progress: Wraps the loop over the blocks, for a progress bar.
        resources: For models larger than memory, for several processes, and for taking up an interrupted run.
        config: Choices of the method ``shrink``; other methods ignore it.
        objective: What the model predicts; by default what its own head does, see
            :func:`~shrinkformer.prune.objective.objective_of`. Methods that look at layers alone ignore it.

    Raises:
        InputError: The method is not known.
        UnsupportedModelError: There is no architecture record for the model.
        NumericalError: Weights, or what the model computes on the examples, are NaN or infinite; it says where.
        OutOfMemoryError: There is not enough memory even for one example at a time.

    Warns:
        ShrinkformerWarning: There are fewer tokens than columns, columns are dead or huge, or batches had to be halved.
    """
    require_method(method)
    batches = padded_right(batches)
    learners: dict[str, Callable[..., Calibrated]] = {
        SHRINK: partial(learn, config=config, objective=objective),
        KWON: partial(learn_kwon, objective=objective),
        KPRUNE: partial(learn_kprune, objective=objective),
    }
    learner = learners.get(method, partial(rank_units, method=method))
    if is_fitted(method):
        warn_of_few_tokens(model, batches)
    return learn_guarded(
        lambda some: learner(model, some, seed=seed, progress=progress, resources=resources), model, batches, resources
    )


def prune_model(
    model: PreTrainedModel,
    batches: Batches,
    *,
    mu: float,
    method: str = DEFAULT_METHOD,
    seed: int = 0,
    sequence_length: float | None = None,
    round_to: int = 1,
    uniform: bool = False,
    config: ShrinkConfig | None = None,
    objective: Objective | None = None,
) -> Pruned:
    """A smaller copy of a model, in one call.

    Args:
        model: Any model with an architecture record, in float32 or float64.
        batches: Calibration examples: model inputs with an ``attention_mask``; labels are not needed.
        mu: Fraction of the MACs that stays, in (0, 1].
        method: Name of a pruning method, one of ``METHOD_NAMES``.
        seed: Seed of random methods.
        sequence_length: Length in tokens at which MACs are counted; the mean of the examples by default.
        round_to: Neurons of a block are a multiple of this.
        uniform: All blocks get the same sizes, so that what :func:`~shrinkformer.save` writes has the shape of a stock
            model and loads without code of ours.
        config: Choices of the method ``shrink``.
        objective: What the model predicts; by default what its own head does.

    Raises:
        InputError: An argument is out of its range.
        BudgetError: The budget is below what every block must keep.
    """
    if sequence_length is None:
        sequence_length = count_tokens(batches) / sum(len(batch["attention_mask"]) for batch in batches)
    budget = Budget(mu, sequence_length, round_to, uniform=uniform)
    require_method(method, uniform=uniform)
    return calibrate(model, batches, method=method, seed=seed, config=config, objective=objective).prune(budget)
