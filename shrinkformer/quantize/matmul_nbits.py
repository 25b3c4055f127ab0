"""The ``MatMulNBits`` operator of ``com.microsoft``: packed weights, and linear layers that answer with such a node."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shrinkformer.architectures import Projection
from shrinkformer.errors import InputError
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.layout import Storable
from shrinkformer.quantize.scheme import Scheme

BITS = (4, 8)

BLOCKS = (16, 32, 64, 128, 256)
"""Inputs with one scale that onnxruntime's CPU kernels have code for; it refuses to load a file with others."""

_FLOAT_ACTIVATIONS = 1
"""The ``accuracy_level`` of MatMulNBits that computes in float32; 4 would round activations to 8 bits."""

LAYER = "shrinkformer.layer"
"""Key of the layer's path in the metadata of its node."""


@dataclass(frozen=True)
class Packed:
    """A weight as MatMulNBits has it; blocks of ``size`` inputs, the last one filled up.

    Attributes:
        codes: ``(outputs, blocks, size * bits / 8)`` uint8, the first of two codes in the low half of a byte.
        scales: ``(outputs, blocks)`` float32.
        zeros: ``(outputs, ceil(blocks * bits / 8))`` uint8, packed in the same way; None where all are the middle code.
        attributes: Of the node.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    attributes: dict[str, int]


def require(name: str, weight: Storable) -> None:
    """Check that the operator holds a weight.

    Raises:
        InputError: It has no such bits or groups.
    """
    bits = weight.scheme.bits
    if bits not in BITS:
        raise InputError(f"{name}: --bits {bits} cannot be exported as ONNX; choose 4 or 8, or another format.")
    _block_size(name, weight.scheme, weight.inputs)


def pack(name: str, projection: Projection, weight: QuantizedWeight) -> Packed:
    """A layer's weight in blocks; a group of several blocks repeats its scale.

    Args:
        name: Path of the layer, for messages.
        projection: The layer.
        weight: What it holds.

    Raises:
        InputError: The operator has no such bits or groups, or the weight is not that of the layer.
    """
    require(name, weight)
    scheme, (outputs, inputs) = weight.grid.scheme, weight.codes.shape
    if (outputs, inputs) != (projection.out_features, projection.in_features):
        expected = (projection.out_features, projection.in_features)
        raise InputError(f"{name}: codes of shape {(outputs, inputs)} for a weight of {expected}; quantize this model.")
    size = _block_size(name, scheme, inputs)
    blocks = -(-inputs // size)
    group = torch.arange(blocks) * size // scheme.width(inputs)
    zero = weight.grid.zero.cpu()[:, group].to(torch.uint8)
    codes = functional.pad(weight.codes.cpu(), (0, blocks * size - inputs))
    codes[:, inputs:] = zero[:, -1:]  # so that what fills up the last block decodes to 0
    return Packed(
        _halves(codes, scheme.bits).view(outputs, blocks, -1).contiguous(),
        weight.grid.scale.cpu()[:, group].float().contiguous(),
        None if scheme.symmetric else _halves(zero, scheme.bits),
        {
            "K": inputs,
            "N": outputs,
            "bits": scheme.bits,
            "block_size": size,
            "accuracy_level": _FLOAT_ACTIVATIONS,
        },
    )


def _block_size(name: str, scheme: Scheme, inputs: int) -> int:
    """The block that fits the groups of a weight and takes the fewest bytes."""
    width, overhead = scheme.width(inputs), 4 + (0 if scheme.symmetric else scheme.bits / 8)
    sizes = [size for size in BLOCKS if width % size == 0 or width == inputs]
    if not sizes:
        raise InputError(
            f"{name}: --group_size {width} cannot be exported as ONNX, whose groups are multiples of {BLOCKS[0]}; "
            "choose such a size, or -1, or another format."
        )
    return min(sizes, key=lambda size: -(-inputs // size) * (size * scheme.bits / 8 + overhead))


def _halves(codes: Tensor, bits: int) -> Tensor:
    """Codes with two of them in each byte, if they have 4 bits: ``(rows, columns)`` to half the columns."""
    if bits == 8:
        return codes
    even = functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)


@contextlib.contextmanager
def as_nodes(model: nn.Module, packed: Mapping[str, Packed]) -> Iterator[None]:
    """Let every quantized layer answer with a MatMulNBits node, and put the layers back, also after an error."""
    with contextlib.ExitStack() as stack:
        for name, weight in packed.items():
            stack.enter_context(_as_node(name, model.get_submodule(name), weight))
        yield


@contextlib.contextmanager
def _as_node(name: str, module: nn.Module, weight: Packed) -> Iterator[None]:
    projection = Projection.of(module)
    assert projection is not None
    tensors = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}
    before = vars(module).get("forward")

    def forward(inputs: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (inputs, *(getattr(module, f"quantized_{kind}") for kind in tensors), None, projection.bias),
            {**weight.attributes},
            dtype=inputs.dtype,
            shape=(*inputs.shape[:-1], projection.out_features),
            version=1,
            metadata_props={LAYER: name},
        )

    try:
        for kind, tensor in tensors.items():  # as buffers, the exporter gives them names that say where they belong
            module.register_buffer(f"quantized_{kind}", tensor, persistent=False)
        vars(module)["forward"] = forward  # hides the method of the class, for this one layer
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:
            vars(module)["forward"] = before
        for kind in tensors:
            delattr(module, f"quantized_{kind}")
