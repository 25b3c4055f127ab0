"""Smaller versions of one block, of any size, from the same second moments."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from shrinkformer.architectures import LayerView, unit_columns
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.groups import elimination_order
from shrinkformer.prune.interpolative import pivoted_cholesky
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.projections import Projected, fold_projected, matching_bases, matrix_roots, value_basis
from shrinkformer.prune.sensitivity import ATTENTION, FEED_FORWARD, Sensitivity
from shrinkformer.prune.surgery import Weights, rebuild

Filling = dict[str, Weights]
Key = TypeVar("Key")

REMEMBERED = 4
"""Sizes of each sublayer whose weights are kept, in float64."""


@dataclass
class BlockLevels:
    """One block of the dense model and everything that smaller versions of it are made from.

    Attributes:
        view: The dense block; it is never changed.
        contexts: Moments of what the heads compute.
        neurons: Moments of what the neurons compute.
        inputs: Moments of what queries, keys and values are computed from; None where heads stay as wide as they are.
        sensitivity: How much errors matter.
        config: Of the dense model.
    """

    view: LayerView
    contexts: Moments
    neurons: Moments
    inputs: Moments | None
    sensitivity: Sensitivity
    config: PreTrainedConfig
    _attention: dict[tuple[int, int, int], Filling] = field(default_factory=dict)
    _feed_forward: dict[int, Filling] = field(default_factory=dict)

    @cached_property
    def size(self) -> LayerSize:
        """Of the dense block."""
        return layer_sizes([self.view])[0]

    @cached_property
    def head_order(self) -> Tensor:
        """Heads, most useful first, ``(heads,)`` int64."""
        metric = self.sensitivity.metrics[self.view.index, ATTENTION]
        weight = self.view.attention_output.weight.double().T
        return elimination_order(self.contexts.second, self.view.head_width, weight, metric)

    @cached_property
    def neuron_order(self) -> Tensor:
        """Neurons, most useful first, ``(neurons,)`` int64.

        Pivots of a Cholesky factorisation of their second moments, each scaled by what the predictions make of what
        the next layer makes of it.
        """
        metric = self.sensitivity.metrics[self.view.index, FEED_FORWARD]
        weight = self.view.feed_forward_output.weight.double().T
        effect = ((weight @ metric) * weight).sum(1).clamp(min=0).sqrt()
        return pivoted_cholesky(self.neurons.second, weights=effect).order

    def kept_heads(self, count: int) -> Tensor:
        """The best heads, ascending."""
        return self.head_order[:count].sort().values

    def kept_neurons(self, count: int) -> Tensor:
        """The best neurons, ascending."""
        return self.neuron_order[:count].sort().values

    @torch.no_grad()
    def build(self, size: LayerSize, config: PreTrainedConfig | None = None) -> LayerView:
        """A copy of the block with these sizes; what is left takes over for what is gone, by least squares.

        Args:
            size: Of the copy.
            config: What the copy refers to; that of the dense model by default.
        """
        memo = {id(self.config): config or self.config}
        view = replace(self.view, block=copy.deepcopy(self.view.block, memo))
        filling: Filling = {}
        attention = size.heads, size.query_width, size.value_width
        if attention != (self.size.heads, self.size.query_width, self.size.value_width):
            filling |= _recent(self._attention, attention, lambda: self._narrow_attention(*attention))
        if size.neurons != self.size.neurons:
            filling |= _recent(self._feed_forward, size.neurons, lambda: self._fewer_neurons(size.neurons))
        if filling:
            rebuild(view, size, filling)
        return view

    def _fewer_neurons(self, count: int) -> Filling:
        feed_forward, kept = self.view.architecture.feed_forward, self.kept_neurons(count)
        output = self.view.feed_forward_output
        new = fold_projected(self.neurons.second, Projected(kept), output.weight.double().T)
        filling = {path: Weights.rows(self.view.linear(path), kept) for path in feed_forward.inputs}
        return {**filling, feed_forward.output: Weights(new.T, output.bias)}

    def _narrow_attention(self, heads: int, query_width: int, value_width: int) -> Filling:
        view, attention, kept = self.view, self.view.architecture.attention, self.kept_heads(heads)
        filling = {path: Weights.rows(view.linear(path), rows) for path, rows in view.head_rows(kept).items()}
        if query_width < view.query_width:
            left, right = zip(*[self._matched[head] for head in kept.tolist()], strict=True)
            filling[attention.query] = filling[attention.query].mixed([basis[:, :query_width] for basis in left])
            filling[attention.key] = filling[attention.key].mixed([basis[:, :query_width] for basis in right])
        projected = Projected(unit_columns(kept, view.head_width))
        if value_width < view.value_width:
            bases = [self._value_bases[head][:, :value_width] for head in kept.tolist()]
            filling[attention.value] = filling[attention.value].mixed(bases)
            projected = Projected(projected.kept, [basis for basis in bases for _ in range(view.queries)])
        output = view.attention_output
        new = fold_projected(self.contexts.second, projected, output.weight.double().T)
        return {**filling, attention.output: Weights(new.T, output.bias)}

    @cached_property
    def _value_bases(self) -> list[Tensor]:
        """For each head, directions of its values, those that matter most first."""
        view = self.view
        root, _ = matrix_roots(self.sensitivity.metrics[view.index, ATTENTION])
        weight = view.attention_output.weight.double().T @ root
        found = []
        for head in range(view.heads):
            start = head * view.head_width
            columns = [
                slice(start + i * view.value_width, start + (i + 1) * view.value_width) for i in range(view.queries)
            ]
            second = torch.stack([self.contexts.second[part, part] for part in columns]).sum(0)
            found.append(value_basis(second, torch.cat([weight[part] for part in columns], dim=1)))
        return found

    @cached_property
    def _matched(self) -> list[tuple[Tensor, Tensor]]:
        """For each head, maps of queries and of keys whose leading columns keep most of the scores."""
        assert self.view.queries == 1, "queries and keys of this family stay as they are"
        attention, width = self.view.architecture.attention, self.view.query_width
        queries, keys = (self._outputs(path) for path in (attention.query, attention.key))
        parts = [slice(head * width, (head + 1) * width) for head in range(self.view.heads)]
        return [matching_bases(queries[0][part, part], keys[1][part, part]) for part in parts]

    def _outputs(self, path: str) -> tuple[Tensor, Tensor]:
        """Second moments of a layer's output, about zero and about the mean."""
        assert self.inputs is not None
        linear, count = self.view.linear(path), self.inputs.count
        weight = linear.weight.double()
        about_mean = weight @ self.inputs.covariance() @ weight.T / count
        mean = weight @ self.inputs.mean
        if linear.bias is not None:
            mean = mean + linear.bias.double()
        return about_mean + torch.outer(mean, mean), about_mean


def _recent(kept: dict[Key, Filling], key: Key, make: Callable[[], Filling]) -> Filling:
    """What was made for a key, if that was not long ago; a search asks for the same few sizes again and again."""
    if key not in kept:
        if len(kept) == REMEMBERED:
            del kept[next(iter(kept))]
        kept[key] = make()
    return kept[key]
