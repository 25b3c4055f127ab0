"""Blocks as they would about become when they are pruned and quantized: quick to make, to choose among them.

A draft knows only what its layers see in the dense model, and rounds once with look-ahead; nothing makes up for errors
of other layers. What is chosen in the end is pruned and quantized with all care, which takes more off an error of
rounding than off one of pruning. So drafts may hold rounding errors in part, see :meth:`Drafts.tempered`.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, Projection, layer_views
from shrinkformer.prune.curves import sized
from shrinkformer.prune.fisher import TOKENS
from shrinkformer.prune.levels import BlockLevels
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.samples import spread
from shrinkformer.prune.shrink import Shrinker
from shrinkformer.prune.sites import HEAD, Site
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import BlockStream
from shrinkformer.quantize.byte_costs import ATTENTION, FEED_FORWARD, FLOAT, SUBLAYERS, ByteCosts, scheme_for
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.layer import quantize_weights
from shrinkformer.quantize.outside import Outside, outside_layers
from shrinkformer.quantize.recipe import Recipe
from shrinkformer.quantize.solver import Hessian

_QUICK = Recipe("draft", attempts=1, rounds=0, correct=False, output_aware=False)

_ROWS = 1024
"""Rows of a large matrix that are rounded at once, so that what is tried stays in the processor's cache."""


@dataclass(frozen=True)
class Choice:
    """What becomes of a sublayer.

    Attributes:
        units: Heads or neurons that stay.
        bits: Of the layers that make them, and of the layer that consumes them.
    """

    units: int
    bits: tuple[int, int]


@dataclass(frozen=True)
class _Layer:
    """What a layer becomes: ``(outputs, inputs)`` float16, and ``(outputs,)`` or None."""

    weight: Tensor
    bias: Tensor | None


class Drafts:
    """Makes drafts, and remembers the layers that it made.

    Args:
        shrinker: What is known about pruning the model. What stands outside its blocks is exchanged for a while, see
            :meth:`surrounded`.
        costs: Of the same model.
        config: Groups, kind of grid and type of the scales.
    """

    def __init__(self, shrinker: Shrinker, costs: ByteCosts, config: QuantizeConfig) -> None:
        model, batches, workers = shrinker.model, spread(shrinker.batches, TOKENS), shrinker.resources.workers
        self._model, self._levels, self._config = model, shrinker.levels, config
        self._sites: dict[str, Sequence[Site]] = {name: costs.sites(name) for name in SUBLAYERS}
        self._inputs = _inputs_of_makers(model, self._sites, workers.share(batches))
        heads = [names[-1] for names in costs.outside if names[-1] in outside_layers(model, HEAD)]
        self._given = Outside(model, batches, config, workers).inputs(heads) if heads else {}
        self._made: dict[tuple[object, ...], list[_Layer]] = {}
        self._matrices: dict[tuple[str, int], Tensor] = {}
        self._hessian: tuple[object, Hessian] | None = None
        self._left: Mapping[int, float] = {}

    def tempered(self, left: Mapping[int, float]) -> "Drafts":
        """The same with rounding errors in blocks that are smaller than rounding once makes them.

        Args:
            left: Size of what careful quantizing leaves of the errors of so many bits; of others that of the next
                fewer.
        """
        other = copy.copy(self)  # what was made is shared
        other._left = left
        return other

    @torch.no_grad()
    def block(self, index: int, choices: Mapping[str, Choice]) -> nn.Module:
        """A copy of a block with smaller and coarser sublayers."""
        level = self._levels[index]
        heads, neurons = choices[ATTENTION].units, choices[FEED_FORWARD].units
        view = level.build(sized(level.size, heads=heads, neurons=neurons))
        for sublayer, choice in choices.items():
            makers, consumer = self._sites[sublayer]
            if choice.bits[0] != FLOAT:
                rows = self._rows(level, sublayer, choice.units)
                for path, layer in zip(makers.paths, self._makers(index, sublayer, choice.bits[0]), strict=True):
                    self._put(view.linear(path), layer, choice.bits[0], rows[path])
            if choice.bits[1] != FLOAT:
                linear = view.linear(consumer.paths[0])
                key = (index, sublayer, choice.units, choice.bits[1])
                if key not in self._made:
                    moments = self._consumed(level, sublayer, choice.units)
                    self._made[key] = self._quantized([linear], moments, choice.bits[1], key[:3])
                self._put(linear, self._made[key][0], choice.bits[1])
        return view.block

    @contextmanager
    def surrounded(self, wanted: Mapping[tuple[str, ...], int]) -> Iterator[None]:
        """Let layers outside the blocks hold what so many bits would; afterwards they are as they were.

        Args:
            wanted: Bits by the names of a layer.
        """
        drafts = {names: self._matrix(names, bits) for names, bits in wanted.items() if bits != FLOAT}
        weights = {names: self._weight(names) for names in drafts}
        before = {names: weight.data for names, weight in weights.items()}
        try:
            for names, draft in drafts.items():
                weights[names].data = draft
            yield
        finally:
            for names, weight in weights.items():
                weight.data = before[names]

    def _put(self, linear: Projection, layer: _Layer, bits: int, rows: Tensor | None = None) -> None:
        """Move a layer from its own weights towards coarse ones."""
        chosen = slice(None) if rows is None else rows
        left = self._left.get(max((known for known in self._left if known <= bits), default=0), 1.0)
        for tensor, coarse in ((linear.weight, layer.weight), (linear.bias, layer.bias)):
            if tensor is not None and coarse is not None:
                tensor.lerp_(coarse[chosen].to(tensor.dtype), left)

    def _makers(self, index: int, sublayer: str, bits: int) -> list[_Layer]:
        """All rows of the layers that make heads or neurons; the rows of some are rows of these."""
        key = (index, sublayer, bits)
        if key not in self._made:
            view = self._levels[index].view
            linears = [view.linear(path) for path in self._sites[sublayer][0].paths]
            self._made[key] = self._quantized(linears, self._inputs[index, sublayer], bits, key[:2])
        return self._made[key]

    @staticmethod
    def _rows(level: BlockLevels, sublayer: str, units: int) -> dict[str, Tensor]:
        if sublayer == ATTENTION:
            return level.view.head_rows(level.kept_heads(units))
        return dict.fromkeys(level.view.architecture.feed_forward.inputs, level.kept_neurons(units))

    @staticmethod
    def _consumed(level: BlockLevels, sublayer: str, units: int) -> Moments:
        """Of what is left of a consumer's input."""
        if sublayer == ATTENTION:
            moments, width = level.contexts, level.view.head_width
            kept = level.kept_heads(units)
            kept = (kept[:, None] * width + torch.arange(width, device=kept.device)).reshape(-1)
        else:
            moments, kept = level.neurons, level.kept_neurons(units)
        return Moments(moments.second[kept][:, kept], moments.total[kept], moments.count)

    def _quantized(self, linears: Sequence[Projection], moments: Moments, bits: int, key: object) -> list[_Layer]:
        """Layers with one input; their biases take up what is lost in the mean."""
        centred = all(linear.bias is not None for linear in linears)
        if self._hessian is None or self._hessian[0] != key:
            second = moments.covariance() if centred else moments.second
            self._hessian = key, Hessian.of(second, damping=_QUICK.damping)
        scheme = scheme_for(self._config, bits, moments.n)
        weights = [linear.weight for linear in linears]
        solved = quantize_weights(weights, self._hessian[1], scheme, _QUICK, dtype=self._config.scale_dtype)
        layers = []
        for linear, one in zip(linears, solved, strict=True):
            decoded, bias = one.weight.decode(), linear.bias
            if centred and bias is not None:
                bias = (bias.double() + (linear.weight.double() - decoded.double()) @ moments.mean).to(bias.dtype)
            layers.append(_Layer(decoded.half(), bias))
        return layers

    @torch.no_grad()
    def _matrix(self, names: tuple[str, ...], bits: int) -> Tensor:
        """A layer outside the blocks; embeddings that are the output layer as well are solved for that use, too."""
        key = names[0], bits
        if key not in self._matrices:
            weight = self._weight(names)
            hessian = None
            if names[-1] in self._given:  # a layer of the head; others look rows up, and every row counts for itself
                second = self._given[names[-1]]
                if len(names) > 1:
                    second = second / second.diagonal().mean().clamp(min=1e-30)
                    second.diagonal().add_(1.0)
                hessian = Hessian.of(second, damping=_QUICK.damping)
            scheme = scheme_for(self._config, bits, weight.shape[1])
            parts = [
                quantize_weights([part], hessian, scheme, _QUICK, dtype=self._config.scale_dtype)[0].weight.decode()
                for part in torch.split(weight, _ROWS)
            ]
            self._matrices[key] = torch.cat(parts).to(weight.dtype)
        return self._matrices[key]

    def _weight(self, names: tuple[str, ...]) -> Tensor:
        weight = self._model.get_submodule(names[0]).weight
        assert isinstance(weight, Tensor)
        return weight


@torch.no_grad()
def _inputs_of_makers(
    model: PreTrainedModel, sites: Mapping[str, Sequence[Site]], batches: Batches
) -> dict[tuple[int, str], Moments]:
    """Second moments of what heads and neurons are computed from, by block and sublayer."""
    stream, found = BlockStream(model, batches), {}
    for view in layer_views(model):
        linears = {name: view.linear(makers.paths[0]) for name, (makers, _) in sites.items()}
        moments = {name: Moments.zeros(linear.in_features, linear.weight.device) for name, linear in linears.items()}
        stream.run(view.block, {linear.module: moments[name].update for name, linear in linears.items()})
        for name, one in moments.items():
            one.all_reduce()
            found[view.index, name] = one
    return found


def untouched(view: LayerView) -> dict[str, Choice]:
    """A block as it is."""
    return {ATTENTION: Choice(view.heads, (FLOAT, FLOAT)), FEED_FORWARD: Choice(view.neurons, (FLOAT, FLOAT))}
