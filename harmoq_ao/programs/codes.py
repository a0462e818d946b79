"""Values as codes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harmoq_ao.common.elementwise import Binary
from harmoq_ao.cpu_kernels.rowwise import Columns, Op, RowProgram
from harmoq_ao.programs.context import Context
from harmoq_ao.programs.steps import Read


def coded(lowering: Context, read: Read, factor: Tensor, offset: Tensor, bits: int, number: float = 1.0) -> Read:
    """Codes of `number` times what is read.

    Args:
        lowering: The walk.
        read: `[rows, width]` values.
        factor: `[width]`, what each column is multiplied with.
        offset: `[width]`, what is added then.
        bits: Width of a code.
        number: What all values are multiplied with first, rounded to float32.
    """
    width = read.width

    def emit(p: RowProgram, to: Columns, at: Any) -> None:
        source = at[0]
        if number != 1:
            source = p.temporary(width)
            p.emit(Op.SCALAR, Binary.MUL, source, at[0], width, p.number(number))
        p.emit(Op.QUANTIZE, to, source, width, bits, p.constant(factor), p.constant(offset))

    return Read(lowering.row_step(read.matrix.rows, width, [read], emit, codes=True), 0, width)
