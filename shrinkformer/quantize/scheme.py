"""How weights are stored: bits, groups and kind of grid."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shrinkformer.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS = (1, 2, 3, 4, 8)

WHOLE_ROW = -1


@dataclass(frozen=True)
class Scheme:
    """The storage of one quantized weight; the size of a file depends on nothing else.

    Attributes:
        bits: Of one code: 8, 4, 3, 2, or 1 for two values of equal size and opposite sign.
        group_size: Neighbouring inputs that share a scale; -1 for one scale per output. Where it does not divide the
            inputs, the last group is smaller.
        symmetric: No zero point is stored; code ``2^(bits - 1)`` means 0. A scale may be negative, so that the one
            more code on the lower side serves the larger side of a group.

    Raises:
        InputError: A value is out of its range.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"--bits {self.bits}: choose one of {', '.join(map(str, BITS))}.")
        if self.group_size != WHOLE_ROW and self.group_size < 2:
            raise InputError(f"--group_size {self.group_size}: must be at least 2, or -1 for one scale per output.")
        if self.bits == 1 and not self.symmetric:
            raise InputError("--bits 1 has two values of opposite sign and no zero point; leave --asymmetric out.")

    @property
    def highest(self) -> int:
        """Largest code; the smallest is 0."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> float:
        """Code that means 0 in a symmetric grid; between the two codes of a binary one."""
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    def width(self, inputs: int) -> int:
        """Columns of a full group of a weight with so many inputs."""
        return inputs if self.group_size == WHOLE_ROW else min(self.group_size, inputs)

    def groups(self, inputs: int) -> int:
        """Scales of one row."""
        return -(-inputs // self.width(inputs))

    def group_of(self, inputs: int, device: "torch.device | str" = "cpu") -> "Tensor":
        """The group of every column, ``(inputs,)`` int64."""
        import torch  # here, so that --help, which lists the numbers of bits, is quick

        return torch.arange(inputs, device=device) // self.width(inputs)

    def fitting(self, inputs: int) -> "Scheme":
        """The same with a group that divides the inputs of one layer.

        That is all of them, where they are fewer; else half of the group, a quarter, ... (down to 16), if one divides.
        Formats hold whole groups only, and pruned layers have widths of their own.
        """
        size = self.width(inputs)
        while inputs % size and size % 2 == 0 and size > 16:
            size //= 2
        return self if inputs % size or self.group_size == WHOLE_ROW else replace(self, group_size=size)

    def stored_bits(self, outputs: int, inputs: int, scale_bits: int = 16) -> int:
        """What codes, scales and zero points of a weight take in a file."""
        overhead = scale_bits + (0 if self.symmetric else self.bits)
        return outputs * (inputs * self.bits + self.groups(inputs) * overhead)
