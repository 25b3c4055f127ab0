"""Learning and pruning that name the place of NaN and infinity, and go on with smaller batches when memory runs out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

from transformers import PreTrainedModel

from shrinkformer.prune.health import faults_located, require_finite_outputs, require_finite_weights
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import Pruned, timed
from shrinkformer.prune.statistics import Batches
from shrinkformer.utils.memory import largest, limited, with_smaller_batches
from shrinkformer.utils.parallel import Workers

T = TypeVar("T")


class _WithBatches(Protocol):
    """What a method has learnt, as a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def batches(self) -> Batches: ...

    @property
    def resources(self) -> Resources: ...


Batched = TypeVar("Batched", bound=_WithBatches)


def learn_guarded(
    learn: Callable[[Batches], T], model: PreTrainedModel, batches: Batches, resources: Resources | None = None
) -> T:
    """Learn something about a model from the calibration examples.

    Args:
        learn: Gets the examples, possibly in smaller batches.
        model: The model; its weights are checked first.
        batches: The examples.
        resources: Where weights come from, where data goes, who shares the work.

    Raises:
        NumericalError: Weights or activations are NaN or infinite.
        OutOfMemoryError: One example at a time is too much.
    """
    resources = resources or Resources()
    require_finite_weights(model)
    model.eval()
    with faults_located(model, batches, resources):
        return in_smaller_batches(
            lambda most: learn(limited(batches, most)), batches, resources.workers, what="calibration"
        )


def prune_guarded(
    prune: Callable[[int], Pruned], model: PreTrainedModel, batches: Batches, resources: Resources
) -> Pruned:
    """Prune a model to a budget, and see that the result computes.

    Args:
        prune: Gets the most examples that it may take at a time.
        model: The dense model.
        batches: The calibration examples.
        resources: See above.

    Raises:
        NumericalError: Weights or activations are NaN or infinite, of the dense model or of what was made of it.
        OutOfMemoryError: One example at a time is too much.
    """

    def attempt(most: int) -> Pruned:
        made = prune(most)
        with timed(made.seconds, "safety"):
            require_finite_outputs(made.model, limited(batches, most), resources.workers)
        return made

    with faults_located(model, batches, resources):
        return in_smaller_batches(attempt, batches, resources.workers, what="pruning")


def prune_limited(calibrated: Batched, prune: Callable[[Batched], Pruned]) -> Pruned:
    """The same for a method of which nothing but the examples depends on how many pass at a time.

    Args:
        calibrated: A model with what was learnt about it.
        prune: Gets it with batches as large as memory allows.

    Raises:
        NumericalError: As :func:`prune_guarded`.
        OutOfMemoryError: As :func:`prune_guarded`.
    """
    batches = calibrated.batches
    return prune_guarded(
        lambda most: prune(replace(calibrated, batches=limited(batches, most))),
        calibrated.model,
        batches,
        calibrated.resources,
    )


def in_smaller_batches(step: Callable[[int], T], batches: Batches, workers: Workers, *, what: str) -> T:
    """Take a step with as many examples at a time as memory allows.

    Several processes would have to agree on that number, and one that failed in the middle of a sum cannot tell the
    others; there the first failure is the last.
    """
    most = largest(batches)
    return step(most) if workers.size > 1 else with_smaller_batches(step, most, what=what)
