"""What a pruned model keeps: the result of every pruning method, and part of every checkpoint."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


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
            ValueError: Another program wrote it: a figure is none, or not finite.
            TypeError: The same: a field is unknown or missing, or of another kind.
        """
        fields: dict[str, Any] = json.loads(text)
        layers: Sequence[dict[str, Any]] = fields.pop("layers")
        for name in ("mu", "seed", "sequence_length", "dense_macs", "macs"):
            _require_number(name, fields[name])
        for name in ("divergences", "uniform"):
            for value in fields.get(name, {}).values():
                _require_number(name, value)
        for name in ("method", "budget"):
            if not isinstance(fields.get(name, ""), str):
                raise TypeError(f"{name} is {fields[name]!r}, which is no text")
        if min(fields["dense_macs"], fields["sequence_length"]) <= 0 or not 0 < fields["mu"] <= 1:
            raise ValueError("dense_macs and sequence_length must be above 0, and mu in (0, 1]")
        for layer in layers:
            for name in ("attention_error", "ffn_error", "query_width", "value_width"):
                _require_number(name, layer.get(name, 0))
                if layer.get(name, 0) < 0:
                    raise ValueError(f"{name} is {layer[name]!r}, below 0")
        return cls(
            layers=tuple(
                LayerPlan(**{**layer, "heads": tuple(layer["heads"]), "neurons": tuple(layer["neurons"])})
                for layer in layers
            ),
            **fields,
        )


def _require_number(name: str, value: Any) -> None:
    """Refuse what cannot be printed as a figure."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, which is no number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, which is not finite")
