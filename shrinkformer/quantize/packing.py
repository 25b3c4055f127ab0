"""Codes as a dense stream of bits in int32 words: no bit is lost, and a code may reach into the next word.

Code ``i`` of a row occupies the bits ``i * bits`` and following, lowest first; words are little-endian. For 2, 4 and
8 bits that is "so many codes in a word"; for 3 bits it is what GPTQ and compressed-tensors (from 0.18) both write.
"""

import torch
from torch import Tensor

WORD = 32


def words(count: int, bits: int) -> int:
    """How many int32 words so many codes take."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack codes along a dimension.

    Args:
        codes: ``(rows, columns)`` uint8, 0 to ``2^bits - 1``.
        bits: Of a code, 1 to 8.
        dim: The dimension that gets shorter, 0 or 1; what is missing in its last word is 0.

    Returns:
        int32, contiguous; ``words(codes.shape[dim], bits)`` long in that dimension.
    """
    if dim == 0:
        return pack(codes.T, bits).T.contiguous()
    rows, columns = codes.shape
    # Eight codes are a whole number of bytes whatever their size, and fit into one int64.
    eights = torch.nn.functional.pad(codes, (0, -columns % 8)).reshape(rows, -1, 8)
    joined = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for place in range(8):
        joined |= eights[..., place].to(torch.int64) << (place * bits)
    stream = joined.view(torch.uint8).reshape(rows, -1, 8)[..., :bits].reshape(rows, -1)
    length = 4 * words(columns, bits)
    stream = torch.nn.functional.pad(stream, (0, max(0, length - stream.shape[1])))[:, :length]
    return stream.contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int, count: int, dim: int = 1) -> Tensor:
    """The codes that :func:`pack` packed.

    Args:
        packed: int32, ``words(count, bits)`` long in ``dim``.
        bits: Of a code, 1 to 8.
        count: Codes in that dimension.
        dim: The packed dimension, 0 or 1.

    Returns:
        uint8, contiguous.
    """
    if dim == 0:
        return unpack(packed.T, bits, count).T.contiguous()
    rows, stream = packed.shape[0], packed.contiguous().view(torch.uint8)
    eights = -(-count // 8)
    stream = torch.nn.functional.pad(stream, (0, max(0, eights * bits - stream.shape[1])))[:, : eights * bits]
    padded = torch.nn.functional.pad(stream.reshape(rows, eights, bits), (0, 8 - bits))
    joined = padded.contiguous().view(torch.int64).reshape(rows, eights)
    codes = torch.empty((rows, eights, 8), dtype=torch.uint8, device=packed.device)
    for place in range(8):
        codes[..., place] = ((joined >> (place * bits)) & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :count].contiguous()
