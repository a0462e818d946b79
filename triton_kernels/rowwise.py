"""Chains of token-wise operations in floats as one kernel: norms, activations, gates, residuals between contractions.

A chain is a list of instructions on values whose rows are tokens; it is compiled into the kernel, in which every value
lives in registers. Values are numbered by the instructions that make them. GELU is `device.gelu`, to its stated error.
Plain torch: :func:`reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from harmoq_ao.common import elementwise
from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels.device import standardize, unary
from harmoq_ao.triton_kernels.launch import OPTIONS, blocks, on_device, power_of_two

_FIELDS = 7
_ELEMENTS = 4096  # of a value that a program holds
_LOAD, _NORM, _UNARY, _BINARY, _SCALAR, _AFFINE, _STORE, _PRODUCT = (tl.constexpr(n) for n in range(8))
NARROW = 8
"""Columns on one side of a product: no more are unrolled."""


class Op(IntEnum):
    """Instructions; their operands follow in the order given."""

    LOAD = 0  # input, first column, whether it has one row for each image
    NORM = 1  # value, constants weight and bias (or -1), number eps
    UNARY = 2  # Unary, value, number (the slope of a leaky ReLU)
    BINARY = 3  # Binary, left, right: of as many columns, or of one
    SCALAR = 4  # Binary, value, number: value (op) number
    AFFINE = 5  # value, constants scale and shift (or -1): value * scale + shift
    STORE = 6  # value, output, first column
    PRODUCT = 7  # value, constants weight `[K, N]` and bias (or -1), K: K or N at most `NARROW`


@dataclass
class Chain:
    """Instructions with what they refer to.

    Attributes:
        code: Opcode, columns, their next power of two, and four operands of each instruction.
        constants: Vectors that instructions name by their place, float32.
        numbers: Likewise, floats.
        columns: Of each output.
        half: Whether each output is bfloat16, else float32.
    """

    code: list[int] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    half: list[bool] = field(default_factory=list)

    def emit(self, op: Op, width: int, *operands: int) -> int:
        """Append an instruction; the number of its value."""
        padded = [*operands, *[0] * (_FIELDS - 3 - len(operands))]
        self.code += [int(op), width, power_of_two(width), *(int(n) for n in padded)]
        return len(self.code) // _FIELDS - 1


# --- the kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def _combine(left: tl.tensor, right: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == 0:
        y = left + right
    elif KIND == 1:
        y = left - right
    else:
        y = left * right
    return y


@triton.jit
def _affine(
    x: tl.tensor, constants: tl.tuple, columns: tl.tensor, inside: tl.tensor, SCALE: tl.constexpr, SHIFT: tl.constexpr
) -> tl.tensor:
    if SCALE >= 0:
        x *= tl.load(constants[SCALE] + columns, mask=inside, other=0.0)[None, :]
    if SHIFT >= 0:
        x += tl.load(constants[SHIFT] + columns, mask=inside, other=0.0)[None, :]
    return x


@triton.jit
def _product(
    x: tl.tensor, weight_ptr: tl.tensor, columns: tl.tensor, inside: tl.tensor, K: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """``x @ weight``, one of the narrower side's columns after the other."""
    channels = tl.arange(0, x.shape[1])
    x = tl.where((channels < K)[None, :], x, 0.0)
    y = tl.zeros([x.shape[0], columns.shape[0]], tl.float32)
    if N <= K:
        for n in tl.static_range(N):
            weight = tl.load(weight_ptr + channels * N + n, mask=channels < K, other=0.0)
            y = tl.where((columns == n)[None, :], tl.sum(x * weight[None, :], 1)[:, None], y)
    else:
        for k in tl.static_range(K):
            weight = tl.load(weight_ptr + k * N + columns, mask=inside, other=0.0)
            y += tl.sum(tl.where((channels == k)[None, :], x, 0.0), 1)[:, None] * weight[None, :]
    return y


@triton.jit
def rowwise_kernel(
    inputs: tl.tuple,
    outputs: tl.tuple,
    constants: tl.tuple,
    rows: int,
    rows_per_image: int,
    CODE: tl.constexpr,
    NUMBERS: tl.constexpr,
    STRIDES: tl.constexpr,
    COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """A block of tokens through the whole chain."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = (tokens < rows)[:, None]
    values = ()
    for i in tl.static_range(COUNT):
        columns = tl.arange(0, CODE[7 * i + 2])
        inside = columns < CODE[7 * i + 1]
        kept = here & inside[None, :]
        if CODE[7 * i] == _LOAD:
            at = tokens // rows_per_image if CODE[7 * i + 5] else tokens
            places = at[:, None] * STRIDES[CODE[7 * i + 3]] + CODE[7 * i + 4] + columns[None, :]
            value = tl.load(inputs[CODE[7 * i + 3]] + places, mask=kept, other=0.0).to(tl.float32)
        elif CODE[7 * i] == _NORM:
            # Columns of padding are zero where they are loaded, and anything behind a sigmoid or a sum.
            value = tl.where(kept, values[CODE[7 * i + 3]], 0.0)
            value = standardize(value, kept, CODE[7 * i + 1], NUMBERS[CODE[7 * i + 6]])
            value = _affine(value, constants, columns, inside, CODE[7 * i + 4], CODE[7 * i + 5])
        elif CODE[7 * i] == _UNARY:
            value = unary(values[CODE[7 * i + 4]], NUMBERS[CODE[7 * i + 5]], CODE[7 * i + 3])
        elif CODE[7 * i] == _BINARY:
            value = _combine(values[CODE[7 * i + 4]], values[CODE[7 * i + 5]], CODE[7 * i + 3])
        elif CODE[7 * i] == _SCALAR:
            value = _combine(values[CODE[7 * i + 4]], NUMBERS[CODE[7 * i + 5]], CODE[7 * i + 3])
        elif CODE[7 * i] == _AFFINE:
            value = _affine(values[CODE[7 * i + 3]], constants, columns, inside, CODE[7 * i + 4], CODE[7 * i + 5])
        elif CODE[7 * i] == _PRODUCT:
            weight_ptr = constants[CODE[7 * i + 4]]
            value = _product(values[CODE[7 * i + 3]], weight_ptr, columns, inside, CODE[7 * i + 6], CODE[7 * i + 1])
            value = _affine(value, constants, columns, inside, -1, CODE[7 * i + 5])
        else:
            value = values[CODE[7 * i + 3]]
            out_ptr = outputs[CODE[7 * i + 4]]
            places = tokens[:, None] * COLUMNS[CODE[7 * i + 4]] + CODE[7 * i + 5] + columns[None, :]
            tl.store(out_ptr + places, value.to(out_ptr.dtype.element_ty), mask=kept)
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking


def launch_rowwise(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    code: Sequence[int],
    numbers: Sequence[float],
    columns: Sequence[int],
    half: Sequence[bool],
    rows: int,
    rows_per_image: int,
) -> list[Tensor]:
    """Run `rowwise_kernel`; arguments as in :func:`reference`.

    Raises:
        KernelError: An input is not contiguous.
    """
    strided = [x.stride() for x in inputs if not x.is_contiguous()]
    if strided:
        raise KernelError("The kernel takes contiguous matrices", found=f"strides {strided[0]}")
    out = _empty(inputs[0], columns, half, rows)
    if rows == 0:
        return out
    block = min(tile(code), power_of_two(rows))
    with on_device(inputs[0]):
        rowwise_kernel[(blocks(rows, block),)](
            tuple(inputs), tuple(out), tuple(constants), rows, rows_per_image,
            **program(code, numbers, [x.shape[1] for x in inputs], columns), BLOCK_M=block,
            num_warps=4, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return out


def program(
    code: Sequence[int], numbers: Sequence[float], strides: Sequence[int], columns: Sequence[int]
) -> dict[str, Any]:
    """Constexprs of `rowwise_kernel` but for its block of rows; ``strides`` are columns of the inputs."""
    return {
        "CODE": tuple(code), "NUMBERS": (0.0, *numbers), "STRIDES": tuple(strides), "COLUMNS": tuple(columns),
        "COUNT": len(code) // _FIELDS,
    }  # fmt: skip


def tile(code: Sequence[int]) -> int:
    """Rows of a program: fewer of wide ones, so that values fit into registers."""
    return min(max(1, _ELEMENTS // max(code[2::_FIELDS])), 128)


def _empty(like: Tensor, columns: Sequence[int], half: Sequence[bool], rows: int) -> list[Tensor]:
    types = [torch.bfloat16 if short else torch.float32 for short in half]
    return [like.new_empty(rows, width, dtype=dtype) for width, dtype in zip(columns, types, strict=True)]


# --- the reference ----------------------------------------------------------------------------------------------------


def reference(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    code: Sequence[int],
    numbers: Sequence[float],
    columns: Sequence[int],
    half: Sequence[bool],
    rows: int,
    rows_per_image: int,
) -> list[Tensor]:
    """What a :class:`Chain` computes, in float32, one instruction after the other.

    Args:
        inputs: `[rows, columns]` each, or `[images, columns]` where an instruction takes a row for each image.
        constants: As of the chain, and likewise the next four.
        code: See there.
        numbers: See there; operands count from 1.
        columns: See there.
        half: See there.
        rows: Of the outputs.
        rows_per_image: Rows of each image of the batch.

    Returns:
        The outputs, `[rows, columns]` bfloat16 or float32.
    """
    out = _empty(inputs[0], columns, half, rows)
    known: list[Tensor] = []
    shifted = [0.0, *numbers]
    for at in range(0, len(code), _FIELDS):
        op, width, _, *operands = code[at : at + _FIELDS]
        value = _step(Op(op), width, operands, known, inputs, constants, shifted, rows_per_image)
        if op == Op.STORE:
            source, number, first, _ = operands
            out[number][:, first : first + width] = known[source]
        known.append(value)
    return out


def _step(
    op: Op,
    width: int,
    operands: Sequence[int],
    known: Sequence[Tensor],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    numbers: Sequence[float],
    rows_per_image: int,
) -> Tensor:
    def vector(place: int) -> Tensor | None:
        return None if place < 0 else constants[place]

    one, two, three, four = operands
    if op is Op.LOAD:
        value = inputs[one][:, two : two + width].float()
        return value.repeat_interleave(rows_per_image, 0) if three else value
    if op is Op.NORM:
        return F.layer_norm(known[one], (width,), vector(two), vector(three), numbers[four])
    if op is Op.UNARY:
        return elementwise.unary(Unary(one), known[two], numbers[three])
    if op in (Op.BINARY, Op.SCALAR):
        right = known[three] if op is Op.BINARY else numbers[three]
        return elementwise.binary(Binary(one), known[two], right)
    if op is Op.PRODUCT:
        return elementwise.affine(known[one] @ constants[two].view(four, width), None, vector(three))
    return elementwise.affine(known[one], vector(two), vector(three)) if op is Op.AFFINE else known[one]


@torch.library.custom_op("harmoq::rowwise", mutates_args=())
def rowwise(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    code: Sequence[int],
    numbers: Sequence[float],
    columns: Sequence[int],
    half: Sequence[bool],
    rows: int,
    rows_per_image: int,
) -> list[Tensor]:
    """:func:`reference` as the operator ``harmoq::rowwise``: the kernel on a GPU."""
    run = launch_rowwise if inputs[0].is_cuda else reference
    return run(inputs, constants, code, numbers, columns, half, rows, rows_per_image)


@rowwise.register_fake
def _(inputs: Any, constants: Any, code: Any, numbers: Any, columns: Any, half: Any, rows: int, rest: Any) -> Any:
    return _empty(inputs[0], columns, half, rows)


__all__ = ["Chain", "Op", "launch_rowwise", "program", "reference", "rowwise", "rowwise_kernel", "tile"]
