"""What the doors of the library are given: a model in whatever wrapper, and examples in whatever form."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from shrinkformer.architectures.wrapped import Inside, unwrap
from shrinkformer.dataset.batches import as_batches
from shrinkformer.prune.objective import Objective, is_headless, objective_of
from shrinkformer.prune.side_files import remember_head
from shrinkformer.prune.statistics import Batches
from shrinkformer.utils.inputs import padded_right, require_padding_id


@dataclass(frozen=True)
class Received:
    """A transformer, the examples that it is calibrated on, and what it predicts where a wrapper knows that.

    Attributes:
        model: With its own head; what is done to it in place is done to its wrapper.
        batches: Model inputs with an ``attention_mask``, none with padding before the first token.
        objective: None for what the model's own head does.
    """

    model: PreTrainedModel
    batches: Batches
    objective: Objective | None


def receive(
    model: Any, data: Any, *, tokenizer: Any = None, objective: Objective | None = None, most: int | None = None
) -> Received:
    """Find the model, and read the examples.

    Args:
        model: See :func:`~shrinkformer.architectures.wrapped.unwrap`.
        data: See :func:`~shrinkformer.dataset.batches.as_batches`.
        tokenizer: For texts; by default the one that a wrapper brings.
        objective: What the model predicts; by default what the wrapper or the model's own head does.
        most: Examples to take at most.

    Raises:
        InputError: Either is nothing that can be used; it says what to pass.
    """
    inside = unwrap(model)
    require_padding_id(inside.model)
    batches = as_batches(data, inside.model, tokenizer=tokenizer or inside.tokenizer, most=most)
    objective = objective or wrapped_objective(inside)
    if inside.wrapper is not None and objective is not None and is_headless(inside.model):
        remember_head(inside.model, objective.sentence)
    return Received(inside.model, padded_right(batches), objective)


def wrapped_objective(inside: Inside) -> Objective | None:
    """What a wrapper makes of a model's outputs, where it makes anything of them."""
    return objective_of(inside.wrapper) if hasattr(inside.wrapper, "similarity_fn_name") else None
