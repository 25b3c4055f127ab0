"""Options of the quantizing commands."""

from dataclasses import dataclass

import torch

from shrinkformer.commands.options import DecoderOptions, EncoderOptions, option
from shrinkformer.errors import InputError
from shrinkformer.prune.sites import OUTSIDE, SCOPES
from shrinkformer.quantize.checkpoint import ALL_FORMATS, DEFAULT_FORMAT
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.recipe import DEFAULT_QUANTIZER, RECIPES
from shrinkformer.quantize.scheme import BITS


@dataclass(frozen=True)
class QuantizeFlags:
    """What ``quantize_bert.py`` and ``quantize_opt.py`` have beside the options of pruning."""

    mu: tuple[float, ...] = option((1.0,), "fraction of MACs that stays; 1 prunes nothing", nargs="+")
    bits: int = option(4, f"bits of a weight: {', '.join(map(str, BITS))}")
    group_size: int = option(128, "neighbouring inputs that share a scale; -1 for one scale per output")
    quantizer: str = option(DEFAULT_QUANTIZER, f"how codes are found: {', '.join(RECIPES)}")
    asymmetric: bool = option(False, "store zero points; fewer readers take them")
    layers: str = option("all", f"which linear layers of the blocks: {', '.join(SCOPES)}")
    also: tuple[str, ...] = option((), f"quantize these, too: {', '.join(OUTSIDE)}", nargs="+")
    format: tuple[str, ...] = option(
        (DEFAULT_FORMAT,), f"what to write, one or several: {', '.join(ALL_FORMATS)}", nargs="+"
    )
    round_to: int = option(32, "keep a multiple of this many neurons in every block, so that groups divide them")

    def check(self) -> None:
        """Check these flags alone.

        Raises:
            InputError: A value is out of its range, or does not go with another one.
        """
        self.quantization(torch.float16)
        for name in self.format:
            if name not in ALL_FORMATS:
                raise InputError(f"--format {name!r}: choose among {', '.join(ALL_FORMATS)}.")
        if self.bits == 1 and set(self.format) != {"float"}:
            raise InputError("--bits 1: no packed format holds one bit; add --format float.")

    @property
    def calibrates(self) -> bool:
        """Whether examples are needed; they also check what was saved."""
        return True

    @property
    def keeps_whole_heads(self) -> bool:
        """Whether heads keep their width; what reads packed weights knows no others."""
        return True

    @property
    def quantizes(self) -> bool:
        """Whether blocks are quantized, which takes more memory."""
        return True

    def quantization(self, scale_dtype: torch.dtype) -> QuantizeConfig:
        """As the library takes it."""
        return QuantizeConfig(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=not self.asymmetric,
            quantizer=self.quantizer,
            layers=self.layers,
            also=self.also,
            scale_dtype=scale_dtype,
        )


@dataclass(frozen=True)
class EncoderQuantizeOptions(QuantizeFlags, EncoderOptions):
    """Options of ``quantize_bert.py``."""

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()


@dataclass(frozen=True)
class DecoderQuantizeOptions(QuantizeFlags, DecoderOptions):
    """Options of ``quantize_opt.py``."""

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()


QuantizeOptions = EncoderQuantizeOptions | DecoderQuantizeOptions
