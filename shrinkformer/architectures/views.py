"""Records applied to a model: typed access to the layers of each block."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shrinkformer.architectures.decoders import DECODERS
from shrinkformer.architectures.encoders import ENCODERS
from shrinkformer.architectures.projection import Projection
from shrinkformer.architectures.record import Architecture
from shrinkformer.errors import UnsupportedModelError

ARCHITECTURES = {**ENCODERS, **DECODERS}


def find_architecture(model_type: str) -> Architecture:
    """The record for a ``config.model_type``.

    Raises:
        UnsupportedModelError: No record has that name.
    """
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(
            f"model_type {model_type!r} has no architecture record; known are {known}. "
            "docs/architectures.md shows how to add one."
        ) from None


@dataclass(frozen=True)
class LayerView:
    """One block of a model, seen through its architecture record.

    Sizes are read from the weights, so a model that was pruned before is ordinary input.
    """

    index: int
    block: nn.Module
    architecture: Architecture

    def linear(self, path: str) -> Projection:
        """The linear layer at a path of the record."""
        module = self.block.get_submodule(path)
        projection = Projection.of(module)
        if projection is None:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise UnsupportedModelError(
                f"layer {self.index}: {path} is a {kind}, not a Linear layer of torch; "
                "prune a float checkpoint, before any quantization, and merge adapters into it first."
            )
        if remedy := Projection.computed_by(module):
            raise UnsupportedModelError(
                f"layer {self.index}: {path} computes its parameters from others whenever it runs; call {remedy} first."
            )
        return projection

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model; every attention module refers to it."""
        config = self.block.get_submodule(self.architecture.attention.module).config
        assert isinstance(config, PreTrainedConfig)
        return config

    @property
    def pre_norm(self) -> bool:
        """Whether norms stand before the sublayers of this very block."""
        record = self.architecture
        return bool(getattr(self.block, record.pre_norm_attribute)) if record.pre_norm_attribute else record.pre_norm

    @property
    def attention_output(self) -> Projection:
        """The consumer of the heads."""
        return self.linear(self.architecture.attention.output)

    @property
    def feed_forward_output(self) -> Projection:
        """The consumer of the neurons."""
        return self.linear(self.architecture.feed_forward.output)

    @property
    def head_size(self) -> int:
        """Size of one query, key or value vector; the widest of them where they differ."""
        return int(self._attention_attribute(self.architecture.attention.head_size_attribute))

    @property
    def query_width(self) -> int:
        """Entries of a query or key vector that are computed; the others are zero."""
        return self._width("query_width")

    @property
    def value_width(self) -> int:
        """Entries of a value vector that are computed; the others are zero."""
        return self._width("value_width")

    def _width(self, name: str) -> int:
        module = self.block.get_submodule(self.architecture.attention.module)
        return int(getattr(module, name, self.head_size))

    @property
    def queries(self) -> int:
        """Query heads that share one key and value head."""
        name = self.architecture.attention.queries_attribute
        return int(self._attention_attribute(name)) if name else 1

    @property
    def head_width(self) -> int:
        """Columns of the output projection that one head feeds: values, times the queries that share them."""
        return self.value_width * self.queries

    @property
    def heads(self) -> int:
        """Number of heads, counted in what can be removed: a key and value head with all the queries that share it."""
        return self.attention_output.in_features // self.head_width

    @property
    def head_values(self) -> Tensor:
        """Weights that make the values, ``(heads, value width, hidden size)``."""
        weight = self.linear(self.architecture.attention.value).weight
        by_head = (self.heads, self.value_width, -1)
        match self.architecture.attention.fused:
            case "by_part":
                return weight.chunk(3)[2].reshape(by_head)
            case "by_head":
                return weight.reshape(self.heads, 3, self.head_size, -1)[:, 2]
        return weight.reshape(by_head)

    def head_rows(self, kept: Tensor) -> dict[str, Tensor]:
        """For every layer that produces heads, the rows that belong to some of the heads.

        Args:
            kept: Heads, ``(heads,)`` int64.

        Returns:
            Row indices by path of the layer.
        """
        attention = self.architecture.attention
        if attention.fused == "by_part":
            columns, part = unit_columns(kept, self.head_size), self.heads * self.head_size
            return {attention.query: torch.cat([columns + index * part for index in range(3)])}
        if attention.fused == "by_head":
            return {attention.query: unit_columns(kept, 3 * self.head_size)}
        return {
            attention.query: unit_columns(kept, self.query_width * self.queries),
            attention.key: unit_columns(kept, self.query_width),
            attention.value: unit_columns(kept, self.value_width),
        }

    def _attention_attribute(self, name: str) -> int:
        return int(getattr(self.block.get_submodule(self.architecture.attention.module), name))

    @property
    def neurons(self) -> int:
        """Number of feed-forward neurons."""
        return self.feed_forward_output.in_features

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.feed_forward_output.out_features


def unit_columns(units: Tensor, width: int) -> Tensor:
    """Columns of whole units, each ``width`` columns wide: ``(units * width,)``."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)


def layer_views(model: PreTrainedModel) -> list[LayerView]:
    """The blocks of a model, first to last.

    Raises:
        UnsupportedModelError: No record fits ``model.config.model_type``, or the model does not match its record.
    """
    architecture = find_architecture(model.config.model_type)
    try:
        blocks = model.base_model.get_submodule(architecture.layers)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no blocks at {architecture.layers!r}, where its record says they are."
        ) from None
    assert isinstance(blocks, nn.ModuleList)
    return [LayerView(index, block, architecture) for index, block in enumerate(blocks)]


def require_alike(model: PreTrainedModel, what: str) -> None:
    """Check that all blocks of a model take the same arguments, as they must to be run one by one.

    Args:
        model: The model.
        what: What is done with it, for the message.

    Raises:
        UnsupportedModelError: They do not.
    """
    kinds = sorted(set(getattr(model.config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} mixes blocks of several kinds of attention ({', '.join(kinds)} in layer_types); "
            f"to {what}, take a checkpoint whose layer_types are all the same."
        )
