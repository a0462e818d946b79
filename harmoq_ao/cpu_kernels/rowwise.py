"""Chains of token-wise operations in one pass: norms, integer linears, activations, gates and residuals.

A :class:`RowProgram` is a list of instructions on matrices whose rows are tokens. No instruction looks at another row,
so a block of rows is taken through the whole program while it stays in the cache; tokens enter and leave memory once.
Rounding to codes, accumulators and epilogues are those of `quant/integer_reference.py`.

Matrices ("slots") are numbered: first the inputs, then the outputs, then temporaries, which exist for one block of rows
only. Inputs and outputs are float32, bfloat16 or uint8 codes `[T, columns]`; temporaries are float32. Only codes are
written to uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.common import elementwise
from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.cpu_kernels import library
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import LinearOperands


class Op(IntEnum):
    """Instructions; their operands follow in the order given, each `Columns` as two numbers (slot, first column)."""

    COPY = 0  # to, from, width
    # to, from (values or codes), K, N, bits, then constants: reciprocal, offset, packed weight, scale, constant,
    # shift (or -1)
    LINEAR = 1
    LAYER_NORM = 2  # to, from, width, constants weight and bias (or -1), number eps
    UNARY = 3  # Unary, to, from, width, number (the slope of a leaky ReLU)
    BINARY = 4  # Binary, to, left, right, width, Broadcast of the right operand
    SCALAR = 5  # Binary, to, from, width, number: from (op) number
    AFFINE = 6  # to, from, width, constants scale and shift (or -1): from * scale + shift
    FLOAT_LINEAR = 7  # to, from, K, N, constants weight [K, N] float32 and bias (or -1)
    PRODUCT = 8  # to, from, K, N, input slot of a matrix [images * K, N] float32: the rows of an image times its own
    QUANTIZE = 9  # to, from, width, bits, constants reciprocal and offset: codes


class Broadcast(IntEnum):
    """Which value of the right operand meets a row's column."""

    NONE = 0  # its own
    COLUMN = 1  # the row's only value: the right operand is one column
    IMAGE = 2  # its column's value for the whole image: the right operand has a row per image


class Columns(NamedTuple):
    """Columns of a slot from `first` on; how many is the instruction's own number."""

    slot: int
    first: int = 0


@dataclass
class RowProgram:
    """Instructions with what they refer to.

    Args:
        inputs: Number of input matrices.
        outputs: Columns and type of each output.
        temporaries: Columns of each temporary.
        code: The instructions as numbers: opcode, number of operands, operands.
        constants: Tensors that instructions name by their place.
        numbers: Likewise, floats.
    """

    inputs: int
    outputs: list[tuple[int, torch.dtype]] = field(default_factory=list)
    temporaries: list[int] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    def emit(self, op: Op, *operands: int | Columns) -> None:
        """Append an instruction."""
        flat = [n for o in operands for n in (o if isinstance(o, Columns) else (int(o),))]
        self.code += [int(op), len(flat), *flat]

    def constant(self, value: Tensor | None) -> int:
        """The place of a constant, -1 for None."""
        if value is None:
            return -1
        self.constants.append(value)
        return len(self.constants) - 1

    def temporary(self, columns: int) -> Columns:
        """A new temporary; all inputs and outputs must be there already."""
        self.temporaries.append(columns)
        return Columns(self.inputs + len(self.outputs) + len(self.temporaries) - 1)

    def temporary_columns(self, slot: int) -> int:
        """Columns of a temporary by its slot."""
        return self.temporaries[slot - self.inputs - len(self.outputs)]

    def number(self, value: float) -> int:
        """The place of a number."""
        self.numbers.append(float(value))
        return len(self.numbers) - 1


def linear_constants(operands: LinearOperands) -> tuple[Tensor, ...]:
    """Constants of :attr:`Op.LINEAR` for a linear with static bounds.

    Returns:
        reciprocal `[K]`, offset `[K]`, weight codes `[K64 / 4, N16, 4]` int8 (see :func:`pack_tiles`), scale `[N]`,
        constant `[N]` and, where weight codes do not have their zero at a whole number, shift `[N]`:
        ``y = (acc + shift * row_sum) * scale + constant``. With a shift the packed weight has a column of ones after
        the others, whose accumulator is the sum of the row's codes.
    """
    assert operands.act is not None
    codes, scale, shift = operands.weight, operands.weight_scale, operands.weight_shift
    columns = codes.shape[1]
    factor, offset = integer_reference.static_qparams(operands.act, operands.joint_scale, operands.joint_shift)
    total = integer_reference.weight_total(codes, scale, shift)
    constant = integer_reference.fold_bias(total, operands.act.lower, operands.bias)
    rows = [codes]
    if bool((shift != 0).any()):
        rows.append(torch.ones(1, columns, dtype=torch.int8))
    packed = pack_tiles(torch.cat(rows))
    vectors = factor.expand(columns).contiguous(), offset.expand(columns).contiguous()
    return (*vectors, packed, scale * operands.act.step, constant, *([shift] if len(rows) == 2 else []))


def pack_tiles(codes: Tensor) -> Tensor:
    """`[N, K]` to `[K64 / 4, N16, 4]`: what one instruction of the CPU multiplies side by side, in whole tiles of AMX.

    K64 and N16 are K and N up to a multiple of 64 and 16; what pads is zero.
    """
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % 64, 0, -rows % 16))
    return padded.reshape(len(padded), -1, 4).transpose(0, 1).contiguous()


def unpack_tiles(packed: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_tiles` but for the rows that pad: `[N16, K]`."""
    return packed.transpose(0, 1).reshape(packed.shape[1], -1)[:, :columns]


# --- the reference ----------------------------------------------------------------------------------------------------


def rowwise_reference(inputs: list[Tensor], program: RowProgram, rows_per_image: int) -> list[Tensor]:
    """What the kernel computes, in plain torch, one instruction after the other on whole matrices.

    Args:
        inputs: `[T, columns]` float32, bfloat16 or uint8 each (fewer rows where an instruction takes a row per image).
        program: The instructions.
        rows_per_image: Rows of each image of the batch.

    Returns:
        The outputs, `[T, columns]`.
    """
    return _Run(inputs, program, rows_per_image).outputs()


class _Run:
    def __init__(self, inputs: list[Tensor], program: RowProgram, rows_per_image: int) -> None:
        self.program, self.rows_per_image = program, rows_per_image
        rows = row_count(inputs, program.code)
        self.slots = [*inputs]
        self.slots += [torch.empty(rows, columns, dtype=dtype) for columns, dtype in program.outputs]
        self.slots += [torch.empty(rows, columns) for columns in program.temporaries]
        self.rows = rows

    def outputs(self) -> list[Tensor]:
        code, at = self.program.code, 0
        while at < len(code):
            operands = code[at + 2 : at + 2 + code[at + 1]]
            getattr(self, Op(code[at]).name.lower())(*operands)
            at += 2 + len(operands)
        return self.slots[self.program.inputs : self.program.inputs + len(self.program.outputs)]

    def read(self, slot: int, first: int, width: int) -> Tensor:
        return self.slots[slot][:, first : first + width].float()

    def write(self, slot: int, first: int, value: Tensor) -> None:
        self.slots[slot][:, first : first + value.shape[1]] = value

    def vector(self, place: int) -> Tensor | None:
        return None if place < 0 else self.program.constants[place]

    def copy(self, to: int, at: int, source: int, first: int, width: int) -> None:
        self.write(to, at, self.read(source, first, width).clone())

    def linear(self, to: int, at: int, source: int, first: int, k: int, n: int, bits: int, *places: int) -> None:
        reciprocal, offset, packed, scale, constant, shift = (self.vector(p) for p in places)
        assert reciprocal is not None
        assert offset is not None
        assert packed is not None
        assert scale is not None
        assert constant is not None
        codes = self.slots[source][:, first : first + k]
        if codes.dtype is not torch.uint8:
            codes = integer_reference.quantize_codes(codes.float(), reciprocal, offset, bits)
        acc = integer_reference.linear_accumulate(codes, unpack_tiles(packed, k).contiguous())
        contraction = acc[:, :n].float()
        if shift is not None:
            contraction = contraction + shift * acc[:, n : n + 1].float()
        self.write(to, at, contraction * scale + constant)

    def quantize(
        self, to: int, at: int, source: int, first: int, width: int, bits: int, factor: int, offset: int
    ) -> None:
        reciprocal, added = self.vector(factor), self.vector(offset)
        assert reciprocal is not None
        assert added is not None
        self.write(
            to, at, integer_reference.quantize_codes(self.read(source, first, width), reciprocal, added, bits).float()
        )

    def layer_norm(self, to: int, at: int, source: int, first: int, width: int, w: int, b: int, eps: int) -> None:
        x = self.read(source, first, width)
        self.write(to, at, F.layer_norm(x, (width,), self.vector(w), self.vector(b), self.program.numbers[eps]))

    def unary(self, kind: int, to: int, at: int, source: int, first: int, width: int, number: int) -> None:
        slope = self.program.numbers[number] if kind == Unary.LEAKY_RELU else 0.0
        self.write(to, at, elementwise.unary(Unary(kind), self.read(source, first, width), slope))

    def binary(self, kind: int, to: int, at: int, a: int, a0: int, b: int, b0: int, width: int, mode: int) -> None:
        right = self.read(b, b0, 1 if mode == Broadcast.COLUMN else width)
        if mode == Broadcast.IMAGE:
            right = right.repeat_interleave(self.rows_per_image, 0)
        self.write(to, at, elementwise.binary(Binary(kind), self.read(a, a0, width), right))

    def scalar(self, kind: int, to: int, at: int, source: int, first: int, width: int, number: int) -> None:
        value = elementwise.binary(Binary(kind), self.read(source, first, width), self.program.numbers[number])
        self.write(to, at, value)

    def affine(self, to: int, at: int, source: int, first: int, width: int, scale: int, shift: int) -> None:
        x = self.read(source, first, width)
        self.write(to, at, elementwise.affine(x, self.vector(scale), self.vector(shift)))

    def float_linear(self, to: int, at: int, source: int, first: int, k: int, n: int, weight: int, bias: int) -> None:
        matrix, added = self.vector(weight), self.vector(bias)
        assert matrix is not None
        y = self.read(source, first, k) @ matrix
        self.write(to, at, y if added is None else y + added)

    def product(self, to: int, at: int, source: int, first: int, k: int, n: int, matrix: int) -> None:
        x = self.read(source, first, k).reshape(-1, self.rows_per_image, k)
        self.write(to, at, (x @ self.slots[matrix].reshape(-1, k, n)).flatten(0, 1))


# --- the kernel -------------------------------------------------------------------------------------------------------


def rowwise(inputs: list[Tensor], program: RowProgram, rows_per_image: int) -> list[Tensor]:
    """Run a program on the CPU of this machine.

    Codes and integer accumulators are the reference's, and so is the float32 result of :attr:`Op.LINEAR`, bit for bit;
    norms differ by rounding, GELU by up to 3e-7 and the other functions by up to 2e-6 of the value or of 1.

    Args:
        inputs: `[T, columns]` float32, bfloat16 or uint8 on the CPU; the row stride may exceed the columns.
        program: The instructions.
        rows_per_image: Rows of each image of the batch.

    Returns:
        The outputs, `[T, columns]`.

    Raises:
        RuntimeError: The program is malformed or does not fit the inputs, or there are no CPU kernels.
    """
    columns, types = [n for n, _ in program.outputs], [dtype for _, dtype in program.outputs]
    return library.required().rowwise(
        inputs, program.constants, program.code, program.numbers, columns, types, program.temporaries, rows_per_image
    )


def row_count(inputs: Sequence[Tensor], code: Sequence[int]) -> int:
    """Rows of every output: the largest number among inputs, but for those that :attr:`Op.PRODUCT` multiplies with."""
    matrices, at = set(), 0
    while at < len(code):
        if code[at] == Op.PRODUCT:
            matrices.add(code[at + 8])
        at += 2 + code[at + 1]
    return max((x.shape[0] for i, x in enumerate(inputs) if i not in matrices), default=0)


def register_fakes(namespace: str) -> None:
    """Tell torch the shapes of this file's operator in the namespace of an instruction set."""

    @torch.library.register_fake(f"{namespace}::rowwise", allow_override=True)
    def _(
        inputs: list[Tensor],
        constants: list[Tensor],
        code: list[int],
        numbers: list[float],
        output_columns: list[int],
        output_types: list[torch.dtype],
        temporaries: list[int],
        rows_per_image: int,
    ) -> list[Tensor]:
        rows = row_count(inputs, code)
        pairs = zip(output_columns, output_types, strict=True)
        return [inputs[0].new_empty(rows, columns, dtype=dtype) for columns, dtype in pairs]
