"""What all formats have in common: the record of a format, and a weight as it lies in a file."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.quantize.grid import Grid, QuantizedWeight
from shrinkformer.quantize.scheme import WHOLE_ROW, Scheme

Tensors = Mapping[str, Tensor]
"""Tensors of one module or of a whole file, by full name."""


class Storable(Protocol):
    """What formats ask about a weight: shapes and scheme, of codes that are there or only planned."""

    @property
    def outputs(self) -> int:
        """Rows of the weight."""

    @property
    def inputs(self) -> int:
        """Columns of the weight."""

    @property
    def scheme(self) -> Scheme:
        """How it is stored."""


@dataclass(frozen=True)
class Stored:
    """A weight read from a file; more general than :class:`QuantizedWeight`, because others reorder columns.

    Attributes:
        codes: ``(outputs, inputs)`` uint8.
        scale: ``(outputs, groups)``, in the type of the file.
        zero: The same shape; whole numbers, or 0.5 where codes are binary.
        group: The group of every column, ``(inputs,)`` int64.
        scheme: What the configuration says about it.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor
    scheme: Scheme

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight, ``(outputs, inputs)``; the scale is rounded to ``dtype`` first, the rest is done in it.

        Differences of two codes are exact in every type with 8 bits of mantissa, so that only the product rounds, and
        the result is what compressed-tensors computes for a model of that type.
        """
        steps = self.codes.to(dtype) - self.zero.to(dtype)[:, self.group]
        return steps.mul_(self.scale.to(dtype)[:, self.group])

    @property
    def in_order(self) -> bool:
        """Whether groups are neighbouring columns."""
        return torch.equal(self.group, self.scheme.group_of(self.codes.shape[1]))

    def weight(self, name: str) -> QuantizedWeight:
        """This as a weight of this package.

        Raises:
            CheckpointError: Its groups are not neighbouring columns.
        """
        inputs = self.codes.shape[1]
        if not self.in_order:
            raise CheckpointError(
                f"{name}: its groups are not {self.scheme.width(inputs)} neighbouring columns (act-order); "
                "load its float weights with read_quantized_state_dict."
            )
        return QuantizedWeight(self.codes, Grid(self.scheme, self.scale.float(), self.zero.float(), inputs))


@dataclass(frozen=True)
class Format:
    """One way to write quantized weights.

    Attributes:
        name: Of ``--format``.
        suffixes: Endings of the tensors that take the place of ``<module>.weight``; the first is always there.
        require: ``(name, weight)``; raises :class:`InputError` where the format cannot hold the weight.
        one_scheme: ``(schemes)``; why all layers of a model must have the same scheme, "" where they need not.
        tensors: ``(name, weight, dtype)``; what is written in place of ``<name>.weight``, scales as ``dtype``.
        config: ``(schemes by module, names of linear layers that are not quantized)``; ``quantization_config`` of
            config.json, None where there is none.
        unpack: ``(name, tensors, config)``; the inverse of ``tensors``, also for files of others.
        config_file: A file that holds the configuration once more, or "".
        bits: ``(name, shapes of all tensors of a file, config)``; bits of a module's codes, 0 where it has none.
    """

    name: str
    suffixes: tuple[str, ...]
    require: Callable[[str, Storable], None]
    tensors: Callable[[str, QuantizedWeight, torch.dtype], dict[str, Tensor]]
    config: Callable[[Mapping[str, Scheme], Sequence[str]], dict[str, Any] | None]
    unpack: Callable[[str, Tensors, Mapping[str, Any]], Stored]
    config_file: str = ""
    bits: Callable[[str, Mapping[str, tuple[int, ...]], Mapping[str, Any]], int] = lambda _name, _shapes, _config: 0
    one_scheme: Callable[[Collection[Scheme]], str] = lambda _schemes: ""

    def read(self, name: str, tensors: Tensors, config: Mapping[str, Any]) -> QuantizedWeight:
        """The weight of a module, from what ``tensors`` and ``config`` returned.

        Raises:
            CheckpointError: The tensors do not fit each other or the configuration.
        """
        return self.unpack(name, tensors, config).weight(name)


def require_words(name: str, weight: Storable, flag: str) -> None:
    """Refuse what no format with codes in words holds.

    Raises:
        InputError: Binary codes, or a last group that is smaller than the others.
    """
    scheme, inputs = weight.scheme, weight.inputs
    if scheme.bits == 1:
        raise InputError(f"{name}: --format {flag} cannot hold --bits 1; use --format float, or at least 2 bits.")
    if scheme.group_size != WHOLE_ROW and inputs % scheme.group_size:
        raise InputError(
            f"{name}: --format {flag} needs a group size that divides the {inputs} inputs, got {scheme.group_size}; "
            f"prune with --round_to {scheme.group_size}, or pass --group_size -1 or one that divides."
        )


def tensor_of(name: str, tensors: Tensors, shape: tuple[int, ...] | None, *, floating: bool = False) -> Tensor:
    """A tensor of a file, checked before anything is computed from it.

    Args:
        name: Full name.
        tensors: Where it should be.
        shape: What it must be; None leaves that to the caller.
        floating: Whether it holds floating-point numbers; otherwise integers.

    Raises:
        CheckpointError: It is missing, or of another kind or shape.
    """
    if name not in tensors:
        raise CheckpointError(f"{name} is missing from the checkpoint; download or quantize the model again.")
    tensor = tensors[name]
    if tensor.is_floating_point() != floating:
        kind = "floating-point numbers" if floating else "integers"
        raise CheckpointError(f"{name} should hold {kind}, got {tensor.dtype}; the file is not what config.json says.")
    if shape is not None and tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} should have shape {shape}, got {tuple(tensor.shape)}; the file is damaged.")
    return tensor


def scheme_of(name: str, bits: object, group_size: object, symmetric: object) -> Scheme:
    """The scheme that a configuration names.

    Raises:
        CheckpointError: This package has no such scheme.
    """
    if not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        raise CheckpointError(f"{name}: {bits!r} bits in quantization_config; only 2, 3, 4 and 8 can be read.")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size < 2 and group_size != WHOLE_ROW):
        raise CheckpointError(f"{name}: group size {group_size!r} in quantization_config; it must be -1 or at least 2.")
    return Scheme(bits, group_size, bool(symmetric))
