"""What a pruned model keeps: the result of every pruning method, and part of every checkpoint."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shrinkformer.errors import InputError, warn

SURPRISE = 3.0
"""Times the predicted damage that a model may do on examples set aside."""


@dataclass(frozen=True)
class LayerPlan:
    """What one block keeps.

    Attributes:
        heads: Indices of the heads that stay, ascending.
        neurons: Indices of the neurons that stay, ascending.
        attention_error: Relative error of the attention sublayer's output on the calibration examples, 0 to 1.
        ffn_error: The same for the feed-forward sublayer.
        query_width: Width of a head's queries and keys; 0 where it was left as it was.
        value_width: Width of a head's values; 0 where it was left as it was.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    attention_error: float = 0.0
    ffn_error: float = 0.0
    query_width: int = 0
    value_width: int = 0


@dataclass(frozen=True)
class Plan:
    """What a pruned model keeps, and how that was decided.

    Attributes:
        method: Name of the pruning method.
        mu: Fraction of the MACs that may stay.
        seed: Seed of the calibration sample and of random methods.
        sequence_length: Length in tokens at which MACs are counted.
        dense_macs: MACs of the model before pruning.
        macs: MACs of the model after pruning.
        layers: One entry per block, first to last.
        divergences: Where several models were made, how far each is from the dense one on examples that none of them
            was made from, by method; the nearest was taken.
        budget: What ``mu`` is a fraction of: ``macs``, or ``latency`` on the machine where it was pruned.
        prediction: Where the method predicts the damage to predictions, ``predicted``: by the search, before refits, on
            calibration examples; ``measured``: of the model that was taken, on examples set aside.
        search: ``cut_short``: 1 where the search for sizes stopped because its time was over.
        uniform: Where all blocks had to be alike and the method measures damage, ``divergence``: what the curves of
            single parts add up to for these sizes, and ``free_divergence``: for the best sizes that may differ.
    """

    method: str
    mu: float
    seed: int
    sequence_length: float
    dense_macs: float
    macs: float
    layers: tuple[LayerPlan, ...]
    divergences: dict[str, float] = field(default_factory=dict)
    budget: str = "macs"
    uniform: dict[str, float] = field(default_factory=dict)
    prediction: dict[str, float] = field(default_factory=dict)
    search: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Fraction of the MACs that stays; never above ``mu`` where that is the budget."""
        return self.macs / self.dense_macs

    @property
    def heads(self) -> list[int]:
        """Number of heads of each block."""
        return [len(layer.heads) for layer in self.layers]

    @property
    def neurons(self) -> list[int]:
        """Number of neurons of each block."""
        return [len(layer.neurons) for layer in self.layers]

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that :meth:`to_json` wrote.

        Raises:
            InputError: The text is no plan.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            layers: Sequence[dict[str, Any]] = fields.pop("layers")
            plan = cls(
                layers=tuple(
                    LayerPlan(**{**layer, "heads": tuple(layer["heads"]), "neurons": tuple(layer["neurons"])})
                    for layer in layers
                ),
                **fields,
            )
            wrong = next(_wrong_values(plan), None)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"this is no plan of shrinkformer ({_in_one_line(error)}); prune again.") from None
        if wrong is not None:
            raise InputError(f"this is no plan of shrinkformer: {wrong}; prune again.")
        return plan


def _wrong_values(plan: Plan) -> Iterator[str]:
    """What cannot be, of values that JSON may hold in place of those of a plan."""
    for name in ("method", "budget"):
        if not isinstance(getattr(plan, name), str):
            yield f"{name} is {getattr(plan, name)!r}"
    for name in ("mu", "sequence_length", "dense_macs", "macs"):
        if not _is_number(getattr(plan, name)):
            yield f"{name} is {getattr(plan, name)!r}"
    if type(plan.seed) is not int:
        yield f"seed is {plan.seed!r}"
    for name, most in (("dense_macs", math.inf), ("sequence_length", math.inf), ("mu", 1)):
        if not 0 < getattr(plan, name) <= most:
            yield f"{name} is {getattr(plan, name)!r}"
    for name in ("divergences", "uniform", "prediction", "search"):
        if not all(map(_is_number, getattr(plan, name).values())):
            yield f"{name} is {getattr(plan, name)!r}"
    for index, layer in enumerate(plan.layers):
        whole = (*layer.heads, *layer.neurons, layer.query_width, layer.value_width)
        if not all(type(number) is int and number >= 0 for number in whole):
            yield f"layer {index} has sizes that are no numbers"
        if not all(_is_number(error) and error >= 0 for error in (layer.attention_error, layer.ffn_error)):
            yield f"layer {index} has errors that are no numbers"


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(value)  # type: ignore[arg-type]  # no bool


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def warn_of_surprise(plan: Plan) -> None:
    """Compare what a plan predicted with what was measured.

    Warns:
        ShrinkformerWarning: There is far more damage than predicted.
    """
    predicted, measured = plan.prediction["predicted"], plan.prediction["measured"]
    if measured > SURPRISE * predicted:
        warn(
            f"mu {plan.mu:g}: on examples set aside the divergence from the dense model is {measured:.5f}, more than "
            f"{SURPRISE:g} times the {predicted:.5f} that was predicted; the examples may be too few "
            "or unlike each other"
        )
