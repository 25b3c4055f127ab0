"""Options of the quantizing commands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from shrinkformer.commands.options import DecoderOptions, EncoderOptions, option
from shrinkformer.errors import InputError
from shrinkformer.prune.sites import OUTSIDE, SCOPES
from shrinkformer.quantize.checkpoint import ALL_FORMATS, DEFAULT_FORMAT
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.recipe import DEFAULT_QUANTIZER, RECIPES
from shrinkformer.quantize.scheme import BITS

_UNMIXED = {
    "gptq": "holds one number of bits for all layers",
    "float": "stores no integers, which would be fewer bytes",
    "onnx": "holds 4 and 8 bits only, and no embeddings",
}
"""Why formats cannot meet a number of bytes."""


@dataclass(frozen=True)
class QuantizeFlags:
    """What ``quantize_bert.py`` and ``quantize_opt.py`` have beside the options of pruning."""

    excludes: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "target_ratio": {
            "mu": "chooses how much of every block stays",
            "bits": "chooses the bits of every layer",
            "layers": "chooses which layers are quantized",
            "also": "chooses whether embeddings and head are quantized",
            "method": "prunes by method shrink",
            "uniform": "chooses the sizes of every block",
            "resume": "begins with a search that cannot be taken up",
        }
    }

    mu: tuple[float, ...] = option((1.0,), "fraction of MACs that stays; 1 prunes nothing", nargs="+")
    target_ratio: float | None = option(
        None,
        "fraction of the dense checkpoint's bytes that may stay: chooses the sizes of the blocks and the bits of every "
        "layer, embeddings included, in place of --mu and --bits (default: as they say)",
    )
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
        if self.target_ratio is not None:
            self._check_target(self.target_ratio)

    def _check_target(self, ratio: float) -> None:
        flag = f"--target_ratio {ratio:g}"
        if not 0 < ratio < 1:
            raise InputError(f"{flag}: must be between 0 and 1; it is the fraction of bytes that stays.")
        for name in self.format:
            if name != DEFAULT_FORMAT:
                raise InputError(f"{flag}: --format {name} {_UNMIXED[name]}; use --format {DEFAULT_FORMAT}.")
        if self.asymmetric:
            raise InputError(
                f"{flag}: no reader takes zero points with several numbers of bits; leave --asymmetric out."
            )

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
