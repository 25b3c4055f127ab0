"""One view of the two kinds of linear layers that transformers has."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Projection:
    """A linear layer; the weight of a GPT-2 ``Conv1D`` is stored transposed, here it looks like any other.

    Attributes:
        module: The layer itself, for hooks.
        weight: ``(outputs, inputs)``; shares memory with the layer, so it can be written to.
        bias: ``(outputs,)`` or None.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Module) -> "Projection | None":
        """The projection that a module is, or None if it is none."""
        if isinstance(module, nn.Linear):
            return cls(module, module.weight, module.bias)
        if isinstance(module, Conv1D):
            return cls(module, module.weight.T, module.bias)
        return None

    @staticmethod
    def computed_by(module: nn.Module) -> str | None:
        """What takes away that a layer's weight or bias is computed whenever it runs, or None where they are stored."""
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(module, name):
                return f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
            if f"{name}_orig" in dict(module.named_parameters(recurse=False)):
                return f"torch.nn.utils.prune.remove(module, {name!r})"
        return None

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return int(self.weight.shape[0])
