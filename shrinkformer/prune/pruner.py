"""Prune a model: calibrate once, then produce a smaller model for any budget."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from transformers import PreTrainedModel

from shrinkformer.prune.budget import Budget
from shrinkformer.prune.columns import warn_of_few_tokens
from shrinkformer.prune.counted import require_counted
from shrinkformer.prune.guarded import learn_guarded
from shrinkformer.prune.kprune import learn_kprune
from shrinkformer.prune.kwon import learn_kwon
from shrinkformer.prune.methods import is_fitted
from shrinkformer.prune.names import DEFAULT_METHOD, KPRUNE, KWON, SHRINK, require_method
from shrinkformer.prune.objective import Objective
from shrinkformer.prune.ranked import rank_units
from shrinkformer.prune.received import receive
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.shrink import learn
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.statistics import Progress
from shrinkformer.prune.stream import mean_length


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
    model: Any,
    batches: Any,
    *,
    method: str = DEFAULT_METHOD,
    seed: int = 0,
    progress: Progress = iter,
    resources: Resources | None = None,
    config: ShrinkConfig | None = None,
    objective: Objective | None = None,
    tokenizer: Any = None,
) -> Calibrated:
    """Learn everything about a model that pruning it to any budget needs.

    Args:
        model: Any model with an architecture record, in any floating-point type, or a wrapper around one
            (:func:`~shrinkformer.architectures.wrapped.unwrap`).
        batches: Calibration examples in any form that :func:`~shrinkformer.dataset.batches.as_batches` reads; no labels
            are needed.
        method: Name of a pruning method, one of ``METHOD_NAMES``.
        seed: Seed of what is drawn at random.
        progress: Wraps the loop over the blocks, for a progress bar.
        resources: For models larger than memory, for several processes, and for taking up an interrupted run.
        config: Choices of the method ``shrink``; other methods ignore it.
        objective: What the model predicts; by default what its own head does, see
            :func:`~shrinkformer.prune.objective.objective_of`. Methods that look at layers alone ignore it.
        tokenizer: For examples that are texts.

    Raises:
        InputError: The method is not known, or model or examples cannot be used; it says what to pass.
        UnsupportedModelError: There is no architecture record for the model, or its blocks compute more than it says.
        NumericalError: Weights, or what the model computes on the examples, are NaN or infinite; it says where.
        OutOfMemoryError: There is not enough memory even for one example at a time.

    Warns:
        ShrinkformerWarning: There are fewer tokens than columns, columns are dead or huge, or batches had to be halved.
    """
    require_method(method)
    given = receive(model, batches, tokenizer=tokenizer, objective=objective)
    model, batches, objective = given.model, given.batches, given.objective
    require_counted(model)
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
    model: Any,
    batches: Any,
    *,
    mu: float,
    method: str = DEFAULT_METHOD,
    seed: int = 0,
    sequence_length: float | None = None,
    round_to: int = 1,
    uniform: bool = False,
    config: ShrinkConfig | None = None,
    objective: Objective | None = None,
    tokenizer: Any = None,
) -> Pruned:
    """A smaller copy of a model, in one call.

    Args:
        model: Any model with an architecture record, in any floating-point type, or a wrapper around one; the copy is
            one of the model inside. To change a ``SentenceTransformer`` itself, take :func:`~shrinkformer.prune_`.
        batches: Calibration examples in any form, as for :func:`calibrate`.
        mu: Fraction of the MACs that stays, in (0, 1].
        method: Name of a pruning method, one of ``METHOD_NAMES``.
        seed: Seed of random methods.
        sequence_length: Length in tokens at which MACs are counted; the mean of the examples by default.
        round_to: Neurons of a block are a multiple of this.
        uniform: All blocks get the same sizes, so that what :func:`~shrinkformer.save` writes has the shape of a stock
            model and loads without code of ours.
        config: Choices of the method ``shrink``.
        objective: What the model predicts; by default what its own head does.
        tokenizer: For examples that are texts.

    Raises:
        InputError: An argument is out of its range, or model or examples cannot be used.
        BudgetError: The budget is below what every block must keep.
    """
    require_method(method, uniform=uniform)
    given = receive(model, batches, tokenizer=tokenizer, objective=objective)
    length = mean_length(given.batches) if sequence_length is None else sequence_length
    budget = Budget(mu, length, round_to, uniform=uniform)
    calibrated = calibrate(
        given.model, given.batches, method=method, seed=seed, config=config, objective=given.objective
    )
    return calibrated.prune(budget)
