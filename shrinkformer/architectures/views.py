"""Records applied to a model: typed access to the layers of each block."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from shrinkformer.architectures.encoders import ENCODERS
from shrinkformer.architectures.record import Architecture
from shrinkformer.errors import UnsupportedModelError


def find_architecture(model_type: str) -> Architecture:
    """The record for a ``config.model_type``.

    Raises:
        UnsupportedModelError: No record has that name.
    """
    try:
        return ENCODERS[model_type]
    except KeyError:
        known = ", ".join(sorted(ENCODERS))
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

    def linear(self, path: str) -> nn.Linear:
        """The linear layer at a path of the record."""
        module = self.block.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise UnsupportedModelError(
                f"layer {self.index}: {path} is a {type(module).__name__}, not a Linear layer; "
                "prune a float checkpoint, before any quantization."
            )
        return module

    @property
    def attention_output(self) -> nn.Linear:
        """The consumer of the heads."""
        return self.linear(self.architecture.attention.output)

    @property
    def feed_forward_output(self) -> nn.Linear:
        """The consumer of the neurons."""
        return self.linear(self.architecture.feed_forward.output)

    @property
    def head_size(self) -> int:
        """Size of one head."""
        attention = self.architecture.attention
        return int(getattr(self.block.get_submodule(attention.module), attention.head_size_attribute))

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.attention_output.in_features // self.head_size

    @property
    def neurons(self) -> int:
        """Number of feed-forward neurons."""
        return self.feed_forward_output.in_features

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.feed_forward_output.out_features


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
