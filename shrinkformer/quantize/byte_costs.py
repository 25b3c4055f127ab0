"""What the parts of a model take in a file, as a function of how wide they are and of their bits.

Everything in a safetensors file is counted: codes, scales, what is not quantized, and the header that names it all.
Sums are never less than the file, and only by some digits in the header more.
"""

import json
import math
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import InputError
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.sites import EMBEDDINGS, HEAD, POSITIONS, Site, block_sites
from shrinkformer.prune.streamed import block_prefix, tied_weights
from shrinkformer.quantize.compressed_tensors import shapes
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.outside import outside_layers
from shrinkformer.quantize.scheme import WHOLE_ROW, Scheme

FLOAT = 0
"""In place of a number of bits: the layer stays as it is."""

BITS = (FLOAT, 8, 4, 3, 2)
"""What a layer may be stored in; most bytes first."""

ATTENTION, FEED_FORWARD = SUBLAYERS = ("attention", "ffn")

_FRAME = 8 + 8 + len('{"__metadata__":{"format":"pt"}}')  # length of the header, its padding, and what it starts with

_Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class ByteCosts:
    """Bytes of a model in compressed-tensors' format.

    Args:
        model: The dense model; shapes are enough.
        config: Groups, kind of grid and type of the scales; its bits do not matter.

    Attributes:
        rest: Bytes of everything that is the same whatever is chosen.
        sizes: Of each block of the dense model.

    Raises:
        InputError: The format does not hold layers of this kind.
    """

    def __init__(self, model: PreTrainedModel, config: QuantizeConfig) -> None:
        self._model, self._config = model, config
        self._views = layer_views(model)
        self.sizes = layer_sizes(self._views)
        self._prefix, self._tied = block_prefix(model), tied_weights(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in self._tied}
        self._digits = len(str(sum(tensor.numel() * 4 for tensor in state.values())))
        chosen = {name for view in self._views for name in self._names(view)}
        chosen |= {f"{name}.weight" for names in self.outside for name in names}
        others = {name: tensor for name, tensor in state.items() if name not in chosen}
        self.rest = _FRAME + self._stored(
            {
                name: (config.scale_dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
                for name, tensor in others.items()
            }
        )

    @property
    def outside(self) -> list[tuple[str, ...]]:
        """Layers outside the blocks that may be quantized, each with all of its names."""
        heads = outside_layers(self._model, HEAD)
        found = []
        for name in outside_layers(self._model, EMBEDDINGS):
            matrix = self._model.get_submodule(name).weight
            twins = [head for head in heads if self._model.get_submodule(head).weight is matrix]
            found.append((name, *twins))
            heads = [head for head in heads if head not in twins]
        return found + [(name,) for name in (*outside_layers(self._model, POSITIONS), *heads)]

    def sites(self, sublayer: str) -> Sequence[Site]:
        """The layers that make heads or neurons, and the one that consumes them."""
        return block_sites(self._views[0].architecture, sublayer)

    def names(self, index: int, site: Site) -> list[str]:
        """Full names of the layers of a site."""
        return [f"{self._prefix}{index}.{path}" for path in site.paths]

    def sublayer(self, index: int, sublayer: str, units: int, bits: tuple[int, int]) -> int | None:
        """Bytes of a sublayer with so many heads or neurons; None where groups do not divide what is left."""
        view, size = self._views[index], self.sizes[index]
        full = _units(size, sublayer)
        total = 0
        makers, consumers = self.sites(sublayer)
        for site, wanted in zip((makers, consumers), bits, strict=True):
            for path, name in zip(site.paths, self.names(index, site), strict=True):
                linear = view.linear(path)
                outputs, inputs = linear.out_features, linear.in_features
                if site is makers:
                    outputs = outputs * units // full
                else:
                    inputs = inputs * units // full
                cost = self._layer(name, outputs, inputs, wanted)
                if cost is None:
                    return None
                total += cost
                if linear.bias is not None:
                    total += self._stored({f"{name}.bias": (self._config.scale_dtype, (outputs,))})
        return total

    def matrix(self, names: tuple[str, ...], bits: int) -> int | None:
        """Bytes of a layer outside the blocks; one with two names is written once, see ``tied_once`` of ``save``."""
        weight = self._model.get_submodule(names[0]).weight
        assert isinstance(weight, torch.Tensor)
        outputs, inputs = weight.shape
        if bits != FLOAT and self._config.group_size > inputs:
            return None
        return self._layer(names[0], outputs, inputs, bits)

    def _layer(self, name: str, outputs: int, inputs: int, bits: int) -> int | None:
        if bits == FLOAT:
            return self._stored({f"{name}.weight": (self._config.scale_dtype, (outputs, inputs))})
        scheme = scheme_for(self._config, bits, inputs)
        if scheme.group_size != WHOLE_ROW and inputs % scheme.group_size:
            return None
        return self._stored(shapes(name, outputs, inputs, scheme, self._config.scale_dtype))

    def _names(self, view: LayerView) -> set[str]:
        """Parameters of a block's linear layers."""
        sites = [site for sublayer in SUBLAYERS for site in self.sites(sublayer)]
        layers = [name for site in sites for name in self.names(view.index, site)]
        return {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}

    def _stored(self, tensors: _Shapes) -> int:
        """Bytes of tensors and of what the header says about them, whatever their place in the file."""
        total = 0
        offset = 10**self._digits - 1  # the longest that one can be
        for name, (dtype, shape) in tensors.items():
            entry = {name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset]}}
            text = json.dumps(entry, separators=(",", ":"), ensure_ascii=False)
            total += math.prod(shape) * dtype.itemsize + len(text.encode()) - 1  # two braces less, one comma more
        return total


def scheme_for(config: QuantizeConfig, bits: int, inputs: int) -> Scheme:
    """How a layer with so many inputs is stored in so many bits."""
    return Scheme(bits, config.group_size, config.symmetric).fitting(inputs)


def _units(size: LayerSize, sublayer: str) -> int:
    return size.heads if sublayer == ATTENTION else size.neurons


def require_packable(model: PreTrainedModel) -> None:
    """Check, from shapes alone, that compressed-tensors holds the layers of a model's blocks.

    Raises:
        InputError: They are of a kind that its readers do not know.
    """
    view = layer_views(model)[0]
    for site in block_sites(view.architecture):
        for path in site.paths:
            if isinstance(view.linear(path).module, Conv1D):
                raise InputError(
                    f"--target_ratio: {path} of {type(model).__name__} is a Conv1D, which readers of "
                    "--format compressed-tensors do not know; set --mu instead, with --format float."
                )
