"""Steps as a graph of kernels for a GPU: token-wise steps that lie together become one kernel each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from harmoq_ao.gpu_programs.layout import Operator, View
from harmoq_ao.gpu_programs.tokenwise import Tokenwise, chains
from harmoq_ao.gpu_programs.torch_steps import Contraction
from harmoq_ao.programs.emit import needed, readers_of
from harmoq_ao.programs.materialize import to_matrix
from harmoq_ao.programs.steps import Matrix, ModuleStep, RowStep, Step, Value, row_level


def emit(output: Value, image: Matrix, images: int, type_of: Callable[[Matrix], torch.dtype]) -> fx.GraphModule:
    """The graph that computes a value from the image.

    Args:
        output: The value.
        image: The matrix that stands for the image batch.
        images: Size of the batch.
        type_of: Type of each matrix.
    """
    return _Emission(output, image, images, type_of).run()


class _Emission:
    def __init__(self, output: Value, image: Matrix, images: int, type_of: Callable[[Matrix], torch.dtype]) -> None:
        self.output, self.images, self.type_of = output, images, type_of
        self.graph, self.root = fx.Graph(), nn.Module()
        self.nodes: dict[Matrix, fx.Node] = {}
        self.image = image
        self.steps = needed(output.matrix)
        self.readers = readers_of(self.steps)

    def run(self) -> fx.GraphModule:
        self.nodes[self.image] = self.module("image_rows", ImageRows(), self.graph.placeholder("image"))
        for group in _in_order(self.steps):
            if isinstance(group[0], RowStep):
                for chain in chains([s for s in group if isinstance(s, RowStep)], self.readers, self.output.matrix):
                    self.rows(chain)
            else:
                self.kernel(group[0])
        matrix = self.output.matrix
        self.graph.output(self.module("output", View(self.output.index, matrix.columns), self.nodes[matrix]))
        return fx.GraphModule(self.root, self.graph)

    def module(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        path = f"{name}_{len(self.root._modules)}"
        self.root.add_module(path, module)
        return self.graph.call_module(path, args)

    def kernel(self, step: Step) -> None:
        assert isinstance(step, ModuleStep)
        if isinstance(step.module, Operator):
            step.module.prepare()
        elif isinstance(step.module, Contraction):
            step.module.prepare(self.type_of(step.reads[0].matrix))
        node = self.module(type(step.module).__name__.lower(), step.module, *(self.nodes[r.matrix] for r in step.reads))
        if len(step.results) == 1:
            self.nodes[step.results[0]] = node
            return
        for number, matrix in enumerate(step.results):
            self.nodes[matrix] = self.graph.call_function(_item, (node, number))

    def rows(self, chain: Sequence[RowStep]) -> None:
        kernel = Tokenwise(chain, self.readers, self.output.matrix, self.type_of, self.images)
        node = self.module("tokenwise", kernel, *(self.nodes[m] for m in kernel.inputs))
        for number, matrix in enumerate(kernel.outputs):
            self.nodes[matrix] = self.graph.call_function(_item, (node, number))


def _item(results: list[Tensor], number: int) -> Tensor:
    return results[number]


def _in_order(steps: Sequence[Step]) -> list[list[Step]]:
    """Groups of steps, each after those that it reads from: token-wise ones of a level, others by themselves."""
    groups: dict[tuple[int, int, int], list[Step]] = {}
    for number, step in enumerate(steps):
        if isinstance(step, RowStep):  # levels are those of before steps were joined
            rows = step.results[0].rows
            step.level = row_level(rows, step.reads)
            groups.setdefault((step.level, 0, rows), []).append(step)
        else:
            step.level = max([r.matrix.level for r in step.reads], default=0)
            groups[step.level, 1, number] = [step]
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


class ImageRows(nn.Module):
    """An image batch `[B, C, H, W]` as a float32 matrix of pixels."""

    def forward(self, image: Tensor) -> Tensor:
        """`[pixels, C]`."""
        return to_matrix(image).float().contiguous()
