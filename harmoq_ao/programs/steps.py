"""What a program consists of: matrices of tokens, and the steps that make them.

Token-wise operations are steps of their own until :mod:`emit` puts those that can run together into one kernel. Two can
if they work on the same number of rows and no other step lies between them, which *levels* tell: a token-wise step is
at the level of what it reads, or one above if that comes from another kind of step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmoq_ao.cpu_kernels.rowwise import Columns, RowProgram
from harmoq_ao.programs.indices import Index

Emit = Callable[[RowProgram, Columns, Sequence[Columns]], None]


@dataclass(eq=False)
class Matrix:
    """Rows of tokens that a step makes.

    Args:
        rows: How many.
        columns: Of each.
        step: What makes it; None for the image.
        codes: Whether its entries are codes, which leave a row program as uint8.
    """

    rows: int
    columns: int
    step: Step | None = None
    codes: bool = False

    @property
    def level(self) -> int:
        """The level of its step."""
        return 0 if self.step is None else self.step.level


@dataclass(frozen=True)
class Read:
    """What a step reads.

    Args:
        matrix: Of these rows.
        first: First column.
        width: Number of columns.
        exact: Whether float32 must reach the step; else bfloat16 does as well.
    """

    matrix: Matrix
    first: int
    width: int
    exact: bool = True


@dataclass(eq=False)
class Step:
    """Anything that makes matrices from matrices.

    Args:
        reads: What it reads.
        results: What it makes.
        level: See above.
    """

    reads: list[Read]
    results: list[Matrix] = field(default_factory=list)
    level: int = 0


class Codes(NamedTuple):
    """A quantizer of columns, ``clamp(round(x * reciprocal + offset), 0, 2**bits - 1)``.

    Attributes:
        reciprocal: `[columns]` float32.
        offset: `[columns]` float32.
        bits: Width of a code.
    """

    reciprocal: Tensor
    offset: Tensor
    bits: int


@dataclass(eq=False)
class RowStep(Step):
    """A token-wise operation.

    Args:
        emit: Appends its instruction, given where the result goes and where its operands are.
        codes: What makes codes of the values that it reads, which it takes as well.
    """

    emit: Emit = lambda *_: None
    codes: Codes | None = None


@dataclass(eq=False)
class ModuleStep(Step):
    """A kernel, or an operation of torch, with its constants as a module.

    Args:
        module: Takes a tensor `[rows, columns]` for each read, whole matrices.
        dtype: Type of the results.
    """

    module: nn.Module = field(default_factory=nn.Identity)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the recorded graph as entries of a matrix.

    Args:
        matrix: The matrix.
        index: Which entries, in which order.
    """

    matrix: Matrix
    index: Index

    @property
    def shape(self) -> torch.Size:
        """Shape of the value."""
        return self.index.shape


#: What a node of the recorded graph is: entries of a matrix, a constant, a list of such, or a plain Python value.
Known = Any


def row_level(rows: int, reads: Sequence[Read]) -> int:
    """Level of a token-wise step on that many rows."""
    levels = [0]
    for read in reads:
        step = read.matrix.step
        together = isinstance(step, RowStep) and read.matrix.rows == rows
        levels.append(read.matrix.level + (0 if together or step is None else 1))
    return max(levels)
