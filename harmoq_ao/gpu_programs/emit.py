"""Steps as a graph of kernels for a GPU: token-wise steps that lie together become one kernel each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from harmoq_ao.gpu_programs.layout import Operator, View
from harmoq_ao.gpu_programs.tokenwise import Tokenwise, chains
from harmoq_ao.gpu_programs.torch_steps import Contraction
from harmoq_ao.programs.emit import Emission
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


class _Emission(Emission):
    def __init__(self, output: Value, image: Matrix, images: int, type_of: Callable[[Matrix], torch.dtype]) -> None:
        super().__init__(output, image, images)
        self.type_of = type_of
        _set_levels(self.steps)

    def first(self) -> nn.Module:
        return ImageRows()

    def last(self) -> nn.Module:
        return View(self.output.index, self.output.matrix.columns)

    def prepare(self, step: ModuleStep) -> None:
        if isinstance(step.module, Operator):
            step.module.prepare()
        elif isinstance(step.module, Contraction):
            step.module.prepare(self.type_of(step.reads[0].matrix))

    def rows(self, group: Sequence[RowStep]) -> None:
        for chain in chains(group, self.readers, self.output.matrix):
            kernel = Tokenwise(chain, self.readers, self.output.matrix, self.type_of, self.images)
            self.several("tokenwise", kernel, kernel.inputs, kernel.outputs)


def _set_levels(steps: Sequence[Step]) -> None:
    """Levels of steps now: those they have are of before steps were joined."""
    for step in steps:
        if isinstance(step, RowStep):
            step.level = row_level(step.results[0].rows, step.reads)
        else:
            step.level = max([r.matrix.level for r in step.reads], default=0)


class ImageRows(nn.Module):
    """An image batch `[B, C, H, W]` as a float32 matrix of pixels."""

    def forward(self, image: Tensor) -> Tensor:
        """`[pixels, C]`."""
        return to_matrix(image).float().contiguous()
