"""Options of the quantizing commands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shrinkformer.commands.flags import changed, check_values, option
from shrinkformer.commands.options import DecoderOptions, EncoderOptions, PruneOptions
from shrinkformer.errors import InputError
from shrinkformer.prune.sites import OUTSIDE, SCOPES
from shrinkformer.quantize.names import ALL_FORMATS, DEFAULT_FORMAT
from shrinkformer.quantize.recipe import DEFAULT_QUANTIZER, RECIPES, get_recipe
from shrinkformer.quantize.scheme import BITS, Scheme

if TYPE_CHECKING:
    import torch

    from shrinkformer.quantize.config import QuantizeConfig

_UNMIXED = {
    "gptq": "holds one number of bits for all layers",
    "float": "stores no integers, which would be fewer bytes",
    "onnx": "holds 4 and 8 bits only, and no embeddings",
}
"""Why formats cannot meet a number of bytes."""


@dataclass(frozen=True)
class QuantizeFlags:
    """What quantizing has beside the options of pruning."""

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

    mu: tuple[float, ...] = changed(PruneOptions, "mu", (1.0,), more="1 prunes nothing; several share one calibration")
    target_ratio: float | None = option(
        None,
        "fraction of bytes that stays, for --mu and --bits",
        group="budget",
        more="of the dense checkpoint; chooses sizes of blocks and bits of layers, embeddings included",
    )
    bits: int = option(4, "bits of a weight", group="method", choices=BITS)
    group_size: int = option(
        128, "neighbouring inputs that share a scale", group="method", more="-1 for one scale per output"
    )
    quantizer: str = option(DEFAULT_QUANTIZER, "how codes are found", group="method", choices=tuple(RECIPES))
    asymmetric: bool = option(False, "store zero points", group="method", advanced=True, more="fewer readers take them")
    layers: str = option("all", "which linear layers of the blocks", group="method", advanced=True, choices=SCOPES)
    also: tuple[str, ...] = option((), "quantize these, too", group="method", advanced=True, choices=OUTSIDE, nargs="+")
    format: tuple[str, ...] = option(
        (DEFAULT_FORMAT,),
        "what to write; one or several",
        group="output",
        choices=ALL_FORMATS,
        nargs="+",
        distinct=True,
    )
    round_to: int = option(
        32,
        "keep a multiple of this many neurons in every block",
        group="budget",
        advanced=True,
        more="so that groups divide them",
    )

    def check(self) -> None:
        """Check these flags alone.

        Raises:
            InputError: A value is out of its range, or does not go with another one.
        """
        Scheme(self.bits, self.group_size, not self.asymmetric)
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
        """Whether a model is made."""
        return True

    @property
    def reads_examples(self) -> bool:
        """Whether something is learnt from calibration examples; rounding to nearest looks at none."""
        pruned = any(mu < 1 for mu in self.mu) or self.target_ratio is not None
        return pruned or get_recipe(self.quantizer).look_ahead

    @property
    def keeps_whole_heads(self) -> bool:
        """Whether heads keep their width; what reads packed weights knows no others."""
        return True

    @property
    def quantizes(self) -> bool:
        """Whether blocks are quantized, which takes more memory."""
        return True

    def quantization(self, scale_dtype: "torch.dtype") -> "QuantizeConfig":
        """As the library takes it."""
        from shrinkformer.quantize.config import QuantizeConfig

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
    """Options for encoders."""

    def __post_init__(self) -> None:
        check_values(self)
        self.check()
        super().__post_init__()


@dataclass(frozen=True)
class DecoderQuantizeOptions(QuantizeFlags, DecoderOptions):
    """Options for language models."""

    def __post_init__(self) -> None:
        check_values(self)
        self.check()
        super().__post_init__()


QuantizeOptions = EncoderQuantizeOptions | DecoderQuantizeOptions
