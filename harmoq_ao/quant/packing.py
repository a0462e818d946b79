"""Bit packing: unsigned codes of 2 to 8 bits stored without gaps in bytes.

Layout. Codes are packed along the last axis, one independent little-endian bit stream per row. With ``b`` bits a code,

* code ``k`` of a row occupies bits ``k * b`` to ``k * b + b - 1`` of the row's stream, least significant bit first;
* bit ``i`` of the stream is bit ``i % 8`` (0 = least significant) of byte ``i // 8``;
* a row ends on a whole byte: ``packed_length(n, b) = ceil(n * b / 8)`` bytes, the unused high bits of the last zero.

So 4-bit codes sit two to a byte with the even code in the low nibble, 2-bit codes four to a byte from the low bits up,
8-bit codes are the bytes themselves, and at 3, 5, 6 and 7 bits a code may straddle two bytes. Eight codes always fill
exactly ``b`` bytes, which is the unit the functions below work in. The layout does not depend on the machine.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.common.tracing import is_traced

MIN_BITS = 2
MAX_BITS = 8
_GROUP = 8  # codes that fill a whole number of bytes at every width


def packed_length(n: int, bits: int) -> int:
    """Bytes that hold one row of ``n`` codes of ``bits`` bits.

    Raises:
        KernelError: ``bits`` is not an integer in 2..8, or ``n`` is negative.
    """
    _check_bits(bits)
    if n < 0:
        raise KernelError("A row cannot hold a negative number of codes", found=n, expected="0 or more")
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last axis.

    Args:
        codes: `[..., n]` uint8, every value in ``0 .. 2**bits - 1``.
        bits: Width of a code, 2 to 8.

    Returns:
        `[..., packed_length(n, bits)]` uint8 in the layout of this module.

    Raises:
        KernelError: Wrong width or dtype, no axis to pack along, or a code that does not fit.
    """
    length = packed_length(_last_axis(codes, "codes"), bits)
    if bool((codes > (1 << bits) - 1).any()):
        raise KernelError(
            "A code does not fit its width",
            found=f"largest code {int(codes.max())}",
            expected=f"0..{(1 << bits) - 1} at {bits} bits",
            remedy="clamp the codes when quantizing",
        )
    groups = _split(codes, _GROUP)
    words = (groups.to(torch.int64) << _shifts(_GROUP, bits, codes.device)).sum(-1, keepdim=True)
    octets = (words >> _shifts(bits, 8, codes.device)) & 0xFF
    return octets.to(torch.uint8).flatten(-2)[..., :length].contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: `[..., packed_length(length, bits)]` uint8.
        bits: Width of a code, 2 to 8.
        length: Codes per row.

    Returns:
        `[..., length]` uint8 codes.

    Raises:
        KernelError: Wrong width or dtype, a row of another length, or unused bits that are not zero.
    """
    expected = packed_length(length, bits)
    if (found := _last_axis(packed, "packed codes")) != expected:
        raise KernelError(
            "Packed rows have the wrong length",
            found=f"{found} bytes a row",
            expected=f"{expected} bytes for {length} codes of {bits} bits",
        )
    groups = _split(packed, bits)
    words = (groups.to(torch.int64) << _shifts(bits, 8, packed.device)).sum(-1, keepdim=True)
    codes = ((words >> _shifts(_GROUP, bits, packed.device)) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)
    _check_padding(packed, bits, length)
    return codes[..., :length].contiguous()


def unpack_signed(packed: Tensor, bits: int, length: int) -> Tensor:
    """Like `unpack`, with the middle code at zero: `[..., length]` int8 in ``-2**(bits - 1) .. 2**(bits - 1) - 1``."""
    return (unpack(packed, bits, length).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise KernelError("Codes of this width cannot be packed", found=f"bits={bits!r}", expected="an integer in 2..8")


def _last_axis(tensor: Tensor, name: str) -> int:
    if tensor.dtype != torch.uint8 or tensor.dim() == 0:
        raise KernelError(
            f"The {name} have the wrong type",
            found=f"{tensor.dtype} with {tensor.dim()} axes",
            expected="torch.uint8 with at least one axis",
        )
    return tensor.shape[-1]


def _check_padding(packed: Tensor, bits: int, length: int) -> None:
    used = length * bits % 8
    if used and not is_traced() and bool((packed[..., -1] >> used).any()):
        raise KernelError(
            "Unused bits at the end of a packed row are not zero",
            found="set bits after the last code",
            expected=f"zeros after bit {used - 1} of the last byte",
            remedy="the stored codes are damaged; take them from the original file again",
        )


def _split(tensor: Tensor, size: int) -> Tensor:
    """`[..., n]` to `[..., ceil(n / size), size]`, zeros at the end."""
    length = tensor.shape[-1]
    count = -(-length // size)
    return F.pad(tensor, (0, count * size - length)).reshape(*tensor.shape[:-1], count, size)


def _shifts(count: int, stride: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.int64) * stride
