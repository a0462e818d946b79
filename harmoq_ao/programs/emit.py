"""Steps as a graph of kernels: token-wise steps that can run together become one row program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from harmoq_ao.cpu_kernels.rowwise import Columns, Op, RowProgram, rowwise
from harmoq_ao.programs.attention_kernel import AttentionKernel
from harmoq_ao.programs.convolution import Depthwise
from harmoq_ao.programs.materialize import Gather, TorchOperator, to_matrix
from harmoq_ao.programs.steps import Codes, Matrix, ModuleStep, Read, RowStep, Step, Value


def emit(output: Value, image: Matrix, images: int) -> fx.GraphModule:
    """The graph that computes a value from the image.

    Args:
        output: The value.
        image: The matrix that stands for the image batch.
        images: Size of the batch.
    """
    return _Emission(output, image, images).run()


class Emission(ABC):
    """A graph of kernels from the steps behind a value; which kernels is for a target to say.

    Args:
        output: The value.
        image: The matrix that stands for the image batch.
        images: Size of the batch.
    """

    def __init__(self, output: Value, image: Matrix, images: int) -> None:
        self.output, self.image, self.images = output, image, images
        self.graph, self.root = fx.Graph(), nn.Module()
        self.nodes: dict[Matrix, fx.Node] = {}
        self.steps = needed(output.matrix)
        self.readers = readers_of(self.steps)

    def run(self) -> fx.GraphModule:
        """The graph, from an image batch to the value."""
        self.nodes[self.image] = self.module("image_rows", self.first(), self.graph.placeholder("image"))
        for group in in_order(self.steps):
            if isinstance(group[0], RowStep):
                self.rows([step for step in group if isinstance(step, RowStep)])
            else:
                self.kernel(group[0])
        self.graph.output(self.module("output", self.last(), self.nodes[self.output.matrix]))
        return fx.GraphModule(self.root, self.graph)

    @abstractmethod
    def first(self) -> nn.Module:
        """From the image batch to its matrix."""

    @abstractmethod
    def last(self) -> nn.Module:
        """From the value's matrix to the value."""

    @abstractmethod
    def rows(self, group: Sequence[RowStep]) -> None:
        """Add token-wise steps of a level, in their order, with :meth:`several`."""

    @abstractmethod
    def prepare(self, step: ModuleStep) -> None:
        """Called before a step's module becomes part of the graph."""

    def module(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        """Add a module and its call."""
        path = f"{name}_{len(self.root._modules)}"
        self.root.add_module(path, module)
        return self.graph.call_module(path, args)

    def several(self, name: str, module: nn.Module, inputs: Sequence[Matrix], outputs: Sequence[Matrix]) -> None:
        """Add a module that returns a list of matrices."""
        node = self.module(name, module, *(self.nodes[m] for m in inputs))
        for number, matrix in enumerate(outputs):
            self.nodes[matrix] = self.graph.call_function(_item, (node, number))

    def kernel(self, step: Step) -> None:
        """Add a step that has a module of its own."""
        assert isinstance(step, ModuleStep)
        self.prepare(step)
        name, inputs = type(step.module).__name__.lower(), [read.matrix for read in step.reads]
        if len(step.results) == 1:
            self.nodes[step.results[0]] = self.module(name, step.module, *(self.nodes[m] for m in inputs))
        else:
            self.several(name, step.module, inputs, step.results)


class _Emission(Emission):
    def first(self) -> nn.Module:
        return ImageRows()

    def last(self) -> nn.Module:
        return Gather(self.output.index, self.output.matrix.columns)

    def prepare(self, step: ModuleStep) -> None:
        if isinstance(step.module, TorchOperator):
            step.module.prepare()
        if isinstance(step.module, Depthwise):
            step.module.out_dtype = step.dtype
        if isinstance(step.module, AttentionKernel):
            (result,) = step.results
            wanted = self._wanted_codes(result)
            if wanted is not None:
                step.module.write_codes(wanted)
                result.codes = True

    def _wanted_codes(self, matrix: Matrix) -> Codes | None:
        """The quantizer of the only step that reads a matrix, if that takes codes of all of it."""
        readers = self.readers.get(matrix, [])
        if len(readers) != 1 or matrix is self.output.matrix:
            return None
        ((step, read),) = readers
        whole = read.first == 0 and read.width == matrix.columns
        return step.codes if whole and isinstance(step, RowStep) else None

    def rows(self, group: Sequence[RowStep]) -> None:
        kernel = _RowGroup(group, self.readers, self.output.matrix)
        rows = group[0].results[0].rows
        self.several("rowwise", Rowwise(kernel.program, rows // self.images or 1), kernel.inputs, kernel.outputs)


def _item(results: list[Tensor], number: int) -> Tensor:
    return results[number]


def in_order(steps: Sequence[Step]) -> list[list[Step]]:
    """Groups of steps, each after those that it reads from: token-wise ones of a level, others by themselves."""
    groups: dict[tuple[int, int, int], list[Step]] = {}
    for number, step in enumerate(steps):
        if isinstance(step, RowStep):
            groups.setdefault((step.level, 0, step.results[0].rows), []).append(step)
        else:
            groups[step.level, 1, number] = [step]
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


class ImageRows(nn.Module):
    """An image batch `[B, C, H, W]` as a matrix of pixels."""

    def forward(self, image: Tensor) -> Tensor:
        return to_matrix(image).float()


class Rowwise(nn.Module):
    """A chain of token-wise operations."""

    def __init__(self, program: RowProgram, rows_per_image: int) -> None:
        super().__init__()
        self.program, self.rows_per_image = program, rows_per_image

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return rowwise(list(inputs), self.program, self.rows_per_image)


class _RowGroup:
    """One row program from token-wise steps in their order."""

    def __init__(self, group: Sequence[RowStep], readers: dict[Matrix, list[tuple[Step, Read]]], last: Matrix) -> None:
        self.group, self.readers, self.last = group, readers, last
        inside = {step.results[0] for step in group}
        self.inputs = list(dict.fromkeys(r.matrix for s in group for r in s.reads if r.matrix not in inside))
        self.outputs = [step.results[0] for step in group if self._leaves(step)]
        self.program = RowProgram(len(self.inputs))
        self.slots: dict[Matrix, int] = {matrix: slot for slot, matrix in enumerate(self.inputs)}
        self.copies: dict[Matrix, Columns] = {}
        self._place()
        for step in group:
            sources = [Columns(self.slots[r.matrix], r.first) for r in step.reads]
            (matrix,) = step.results
            step.emit(self.program, Columns(self.slots[matrix]), sources)
            if matrix in self.copies:
                to = self.copies[matrix]
                width = self._span(matrix)[1] - to.first
                self.program.emit(Op.COPY, to, Columns(self.slots[matrix], to.first), width)

    def _leaves(self, step: RowStep) -> bool:
        matrix = step.results[0]
        return matrix is self.last or any(reader not in self.group for reader, _ in self.readers.get(matrix, []))

    def _span(self, matrix: Matrix) -> tuple[int, int]:
        """First column that others read, and the one behind their last."""
        reads = [r for s, r in self.readers.get(matrix, []) if s not in self.group]
        if matrix is self.last or not reads:
            return 0, matrix.columns
        return min(r.first for r in reads), max(r.first + r.width for r in reads)

    def _place(self) -> None:
        """Slots: outputs of which all is read, in float32 or by no step here, are computed in place; others are copied,
        as far as they are read."""
        temporaries = []
        for matrix in self.outputs:
            exact = matrix is self.last or any(r.exact for s, r in self.readers.get(matrix, []) if s not in self.group)
            dtype = torch.uint8 if matrix.codes else torch.float32 if exact else torch.bfloat16
            self.program.outputs.append((matrix.columns, dtype))
            slot = len(self.inputs) + len(self.program.outputs) - 1
            read_here = any(s in self.group for s, _ in self.readers.get(matrix, []))
            first, end = self._span(matrix)
            if (dtype is torch.float32 or not read_here) and end - first == matrix.columns:
                self.slots[matrix] = slot
            else:
                self.copies[matrix] = Columns(slot, first)
                temporaries.append(matrix)
        temporaries += [s.results[0] for s in self.group if s.results[0] not in self.outputs]
        self._share(temporaries)

    def _share(self, temporaries: list[Matrix]) -> None:
        """Temporaries in as few slots as possible, so that a block of rows stays in the first-level cache."""
        made = {step.results[0]: number for number, step in enumerate(self.group)}
        last = dict(made)
        for number, step in enumerate(self.group):
            last.update({r.matrix: number for r in step.reads if r.matrix in made})
        free: list[int] = []  # the one used last is the one still in the cache
        for step in self.group:
            matrix, now = step.results[0], made[step.results[0]]
            if matrix in temporaries:
                fitting = [slot for slot in reversed(free) if self.program.temporary_columns(slot) >= matrix.columns]
                if fitting:
                    self.slots[matrix] = fitting[0]
                    free.remove(fitting[0])
                else:
                    self.slots[matrix] = self.program.temporary(matrix.columns).slot
            # a step never writes where it reads from: that would cost a copy where columns differ
            free += [
                self.slots[m] for m in temporaries if last[m] == now and m in self.slots and self.slots[m] not in free
            ]


def needed(matrix: Matrix) -> list[Step]:
    """Steps behind a matrix, each after those it reads from."""
    found: dict[Step, None] = {}
    stack: list[tuple[Step, bool]] = [] if matrix.step is None else [(matrix.step, False)]
    while stack:
        step, ready = stack.pop()
        if ready:
            found.setdefault(step)
            continue
        if step in found:
            continue
        stack.append((step, True))
        stack += [
            (r.matrix.step, False) for r in step.reads if r.matrix.step is not None and r.matrix.step not in found
        ]
    return list(found)


def readers_of(steps: Sequence[Step]) -> dict[Matrix, list[tuple[Step, Read]]]:
    """Who reads each matrix."""
    readers: dict[Matrix, list[tuple[Step, Read]]] = {}
    for step in steps:
        for read in step.reads:
            readers.setdefault(read.matrix, []).append((step, read))
    return readers
