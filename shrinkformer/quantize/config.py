"""What is asked of a quantizer, and what it reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from shrinkformer.errors import InputError
from shrinkformer.prune.sites import OUTSIDE, SCOPES
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.recipe import DEFAULT_QUANTIZER, Recipe, get_recipe
from shrinkformer.quantize.scheme import WHOLE_ROW, Scheme

_FEW_BITS = 4


@dataclass(frozen=True)
class QuantizeConfig:
    """What :func:`quantize_` does.

    Attributes:
        bits: 8, 4, 3, 2 or 1.
        group_size: Neighbouring inputs that share a scale; -1 for one scale per output.
        symmetric: Store no zero points.
        quantizer: Name of a recipe: ``shrink``, ``gptq`` (as published) or ``rtn`` (round to nearest).
        layers: ``all`` linear layers of the blocks, or those of ``attention`` or ``ffn`` only.
        also: What is quantized beside the blocks: ``embeddings``, ``head``, ``positions``.
        scale_dtype: In which scales are stored.
        bits_of: Bits by full path of the layer, in place of ``bits``; layers that are not named stay as they are.

    Raises:
        InputError: A value is out of its range.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    quantizer: str = DEFAULT_QUANTIZER
    layers: str = "all"
    also: tuple[str, ...] = ()
    scale_dtype: torch.dtype = torch.float16
    bits_of: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        _ = self.scheme, self.recipe, *(self.scheme_of(name) for name in self.bits_of or ())
        if self.layers not in SCOPES:
            raise InputError(f"--layers {self.layers!r}: choose one of {', '.join(SCOPES)}.")
        for name in self.also:
            if name not in OUTSIDE:
                raise InputError(f"--also {name!r}: choose among {', '.join(OUTSIDE)}.")

    @property
    def scheme(self) -> Scheme:
        """How weights are stored."""
        return Scheme(self.bits, self.group_size, self.symmetric)

    def scheme_of(self, name: str) -> Scheme | None:
        """How the layer at a full path is stored; None where it stays as it is."""
        if self.bits_of is None:
            return self.scheme
        return replace(self.scheme, bits=self.bits_of[name]) if name in self.bits_of else None

    @property
    def amount(self) -> str:
        """Bits, in words."""
        few, many = min(self._numbers), max(self._numbers)
        return f"{few} bits" if few == many else f"{few} to {many} bits"

    @property
    def _numbers(self) -> set[int]:
        return set(self.bits_of.values()) if self.bits_of else {self.bits}

    @property
    def fast(self) -> bool:
        """Whether calibration may round what goes into products by 0.2 %, far less than codes of few bits do."""
        return self.recipe.fast and max(self._numbers) <= _FEW_BITS

    @property
    def recipe(self) -> Recipe:
        """What is done to find codes."""
        return get_recipe(self.quantizer)


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        layer: Number of the block; None outside the blocks.
        name: Path of the layer in the block, or in the model.
        error: Relative error of its output on the calibration examples, 0 to about 1; of its weights where nothing was
            fitted to examples.
        nearest_error: The same for rounding to nearest.
        damping: Of the second moments, relative to their mean diagonal.
        trust: How far the layer was corrected for errors before it, 0 to 1, by part: of its input, of the residual.
        seconds: Time of the solution; what is known about its input is collected for several layers at once.
        bits: Of a code.
        group_size: Neighbouring inputs that share a scale, as it is in the file; -1 for one scale per output.
        fitted: Inputs of the layer, if it was fitted to examples of them; 0 if it was not.
    """

    layer: int | None
    name: str
    error: float
    nearest_error: float
    damping: float
    trust: tuple[float, ...]
    seconds: float
    bits: int
    group_size: int = WHOLE_ROW
    fitted: int = 0

    def known_errors(self, tokens: int) -> tuple[float | None, float | None]:
        """Its error and that of rounding to nearest, None where a fit to so few tokens says nothing of others."""
        return (None, None) if self.fitted > tokens else (self.error, self.nearest_error)


@dataclass
class Quantized:
    """What :func:`quantize_` did.

    Attributes:
        weights: Integers by full path of the layer, such as ``model.decoder.layers.0.fc1``.
        layers: One report for each of them.
        config: What was asked for.
        seconds: Time by step.
    """

    weights: dict[str, QuantizedWeight]
    layers: list[LayerReport]
    config: QuantizeConfig
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def group_sizes(self) -> list[int]:
        """All sizes of groups that are there, ascending; -1 where an output has one scale."""
        return sorted({layer.group_size for layer in self.layers})

    @property
    def storage(self) -> str:
        """Groups as they are in the file and kind of grid, in words."""
        found, asked = self.group_sizes, self.config.group_size
        sizes = [size for size in found if size != WHOLE_ROW]
        group = f"groups of {' and '.join(map(str, sizes))}" if sizes else "one scale per output"
        if sizes and found != [asked]:
            group += f" ({asked} were asked for; a group must divide the inputs of its layer)"
        return f"{group}, {'symmetric' if self.config.symmetric else 'with zero points'}"
