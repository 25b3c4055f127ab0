"""What a pruned model may cost, as it is asked for."""

from dataclasses import dataclass

from shrinkformer.errors import InputError
from shrinkformer.pictures.columns import exact


@dataclass(frozen=True)
class Budget:
    """What a pruned model may cost.

    Attributes:
        mu: Fraction of the MACs that may stay, in (0, 1].
        sequence_length: Length in tokens at which MACs are counted; a mean, so any positive number.
        round_to: Number of neurons of a block is a multiple of this, where that makes matrix products faster.
        min_heads: Heads that every block keeps at least.
        min_neurons: Neurons that every block keeps at least.
        uniform: All blocks get the same sizes, and such as a configuration of stock classes can say.

    Raises:
        InputError: A value is out of its range.
    """

    mu: float
    sequence_length: float
    round_to: int = 1
    min_heads: int = 1
    min_neurons: int = 1
    uniform: bool = False

    @property
    def amount(self) -> str:
        """``mu`` in names of folders."""
        return exact(self.mu)

    def __post_init__(self) -> None:
        if not 0 < self.mu <= 1:
            raise InputError(f"--mu {self.mu}: must be in (0, 1]; it is the fraction of MACs that stays.")
        if not self.sequence_length > 0:
            raise InputError(f"--sequence_length {self.sequence_length}: must be positive.")
        for name in ("round_to", "min_heads", "min_neurons"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1.")
