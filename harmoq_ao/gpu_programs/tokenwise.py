"""Token-wise steps of a program as chains that one kernel computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from harmoq_ao.cpu_kernels.rowwise import Broadcast
from harmoq_ao.cpu_kernels.rowwise import Op as Instruction
from harmoq_ao.gpu_programs.lowering import instructions
from harmoq_ao.gpu_programs.operands import Table
from harmoq_ao.programs.steps import Matrix, Read, RowStep, Step
from harmoq_ao.triton_kernels.rowwise import Chain, Op, rowwise

Readers = Mapping[Matrix, Sequence[tuple[Step, Read]]]


def chains(group: Sequence[RowStep], readers: Readers, last: Matrix) -> list[list[RowStep]]:
    """Token-wise steps of one level as chains: what a kernel holds in registers is read whole, and by itself.

    Args:
        group: The steps in order, of as many rows.
        readers: Who reads each matrix.
        last: The matrix that the program is for.
    """
    depth: dict[Matrix, int] = {}
    whole: dict[Matrix, bool] = {}
    found: list[tuple[int, set[Matrix], list[RowStep]]] = []
    for step in group:
        own = [(read, depth[read.matrix]) for read in step.reads if read.matrix in depth]
        (result,) = step.results
        parts = [at + (0 if whole[r.matrix] and r.first == 0 and r.width == r.matrix.columns else 1) for r, at in own]
        depth[result] = max(parts, default=0)
        whole[result] = all(op is not Instruction.COPY for op, _, _ in instructions(step))
        touched = {result, *(read.matrix for read in step.reads)}
        joined = [entry for entry in found if entry[0] == depth[result] and entry[1] & touched]
        steps = [s for entry in joined for s in entry[2]]
        found = [entry for entry in found if entry not in joined]
        order = sorted([*steps, step], key=group.index)
        found.append((depth[result], touched.union(*(entry[1] for entry in joined)), order))
    return [steps for _, _, steps in sorted(found, key=lambda entry: entry[0])]


class Tokenwise(nn.Module):
    """A chain as one kernel.

    Args:
        steps: Its steps in order.
        readers: Who reads each matrix.
        last: The matrix that the program is for.
        type_of: Type of each matrix.
        images: Size of the batch.

    Attributes:
        inputs: The matrices that it takes, in order.
        outputs: The matrices that it makes, in order.
    """

    def __init__(
        self,
        steps: Sequence[RowStep],
        readers: Readers,
        last: Matrix,
        type_of: Callable[[Matrix], torch.dtype],
        images: int,
    ) -> None:
        super().__init__()
        made = [step.results[0] for step in steps]
        self.rows = made[0].rows
        self.rows_per_image = max(1, self.rows // images)
        self.inputs = list(dict.fromkeys(r.matrix for s in steps for r in s.reads if r.matrix not in made))
        inside = set(map(id, steps))
        self.outputs = [m for m in made if m is last or any(id(s) not in inside for s, _ in readers.get(m, []))]
        self.chain = Chain(
            columns=[m.columns for m in self.outputs],
            half=[type_of(m) is torch.bfloat16 for m in self.outputs],
        )
        _Translation(self.chain, self.inputs, self.outputs, self.rows).run(steps)
        self.constants = nn.ModuleList(Table(vector.float()) for vector in self.chain.constants)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """`[rows, columns]` each."""
        matrices = [x.contiguous() for x in inputs]
        constants = [table.tensor for table in self.constants]
        c = self.chain
        return rowwise(matrices, constants, c.code, c.numbers, c.columns, c.half, self.rows, self.rows_per_image)


class _Translation:
    """From the instructions of the CPU's row programs, on slots, to those of a chain, on values."""

    def __init__(self, chain: Chain, inputs: list[Matrix], outputs: list[Matrix], rows: int) -> None:
        self.chain, self.inputs, self.outputs, self.rows = chain, inputs, outputs, rows
        self.values: dict[Matrix, int] = {}
        self.loaded: dict[tuple[Matrix, int, int], int] = {}

    def run(self, steps: Sequence[RowStep]) -> None:
        for step in steps:
            self.step(step)

    def value(self, read: Read, width: int, first: int = 0) -> int:
        """The value that a step reads, loaded once."""
        if read.matrix in self.values:
            return self.values[read.matrix]
        key = (read.matrix, read.first + first, width)
        if key not in self.loaded:
            of_image = read.matrix.rows != self.rows
            self.loaded[key] = self.chain.emit(
                Op.LOAD, width, self.inputs.index(read.matrix), read.first + first, of_image
            )
        return self.loaded[key]

    def vector(self, value: Tensor | None) -> int:
        if value is None:
            return -1
        self.chain.constants.append(value.contiguous())
        return len(self.chain.constants) - 1

    def number(self, value: float) -> int:
        """The place of a number; 0 is none."""
        self.chain.numbers.append(value)
        return len(self.chain.numbers)

    def step(self, step: RowStep) -> None:
        (result,) = step.results
        found = instructions(step)
        if found[0][0] is Instruction.COPY:
            for (_, (_, to, source, first, width), _), read in zip(found, step.reads, strict=True):
                assert step.reads[source] is read
                value = self.value(read, width, first)
                self.chain.emit(Op.STORE, width, value, self.outputs.index(result), to)
            return
        (entry,) = found
        value = self.instruction(step, *entry)
        self.values[result] = value
        if result in self.outputs:
            self.chain.emit(Op.STORE, result.columns, value, self.outputs.index(result), 0)

    def instruction(self, step: RowStep, op: Instruction, operands: list[int], program) -> int:  # type: ignore[no-untyped-def]
        def vector(place: int) -> int:
            return self.vector(None if place < 0 else program.constants[place])

        (result,) = step.results
        width, reads = result.columns, step.reads
        if op is Instruction.LAYER_NORM:
            *_, weight, bias, eps = operands
            value = self.value(reads[0], width)
            return self.chain.emit(
                Op.NORM, width, value, vector(weight), vector(bias), self.number(program.numbers[eps])
            )
        if op is Instruction.AFFINE:
            *_, scale, shift = operands
            return self.chain.emit(Op.AFFINE, width, self.value(reads[0], width), vector(scale), vector(shift))
        if op in (Instruction.UNARY, Instruction.SCALAR):
            number = self.number(program.numbers[operands[-1]])
            kind = Op.UNARY if op is Instruction.UNARY else Op.SCALAR
            return self.chain.emit(kind, width, operands[0], self.value(reads[0], width), number)
        if op is Instruction.FLOAT_LINEAR:
            *_, channels, _, weight, bias = operands
            return self.chain.emit(
                Op.PRODUCT, width, self.value(reads[0], channels), vector(weight), vector(bias), channels
            )
        assert op is Instruction.BINARY
        left = self.value(reads[0], width)
        right = self.value(reads[1], 1 if operands[-1] == Broadcast.COLUMN else width)
        return self.chain.emit(Op.BINARY, width, operands[0], left, right)
