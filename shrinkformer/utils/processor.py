"""What the processor does faster in bfloat16, and whether that is used: all that results may owe to the kind of CPU.

A CPU with AMX passes examples through float32 models in bfloat16, others do not. ``SHRINKFORMER_BF16=1`` makes any CPU
behave as one with AMX (slowly where it has none), ``0`` as one without. It is read whenever it matters.
"""

import os
from dataclasses import dataclass

import torch

from shrinkformer.errors import InputError

SWITCH = "SHRINKFORMER_BF16"


@dataclass(frozen=True)
class Processor:
    """A kind of CPU.

    Attributes:
        bf16_products: Products of float32 matrices may round what goes in to bfloat16. Used only where that is no loss
            (rows rounded before, gradients in half precision), so that no more than the order of sums changes; where a
            CPU has no units for it, nothing does.
        bf16_autocast: Float32 models compute in bfloat16 while they are examined: gradients, divergence, moments.
    """

    bf16_products: bool
    bf16_autocast: bool

    @classmethod
    def here(cls) -> "Processor":
        """This machine's, or what the switch says.

        Raises:
            InputError: The switch is neither 0 nor 1.
        """
        switch = os.environ.get(SWITCH, "")
        if switch not in {"", "0", "1"}:
            raise InputError(
                f"{SWITCH}={switch}: set it to 1 (as a CPU with AMX) or 0 (as one without), or leave it unset."
            )
        if switch:
            return cls(bf16_products=switch == "1", bf16_autocast=switch == "1")
        return cls(bf16_products=True, bf16_autocast=bool(torch.cpu.get_capabilities().get("amx_bf16", False)))
