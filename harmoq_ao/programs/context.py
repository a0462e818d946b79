"""What the handlers of attention ask of the walk over a recorded graph: they know it by this protocol alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harmoq_ao.programs.indices import Index, Roots
from harmoq_ao.programs.steps import Emit, Matrix, Read, Value


class Context(Protocol):
    """See :class:`Lowering`.

    Attributes:
        known: What each node is.
        half: Whether float products run on bfloat16 operands.
        roots: Indices of values as they are made.
        images: Size of the batch.
        masks: Masks that were met, and what became of them.
    """

    known: dict[Any, Any]
    half: bool
    roots: Roots
    images: int
    masks: list[tuple[Tensor, Any]]

    def module_step(
        self,
        module: nn.Module,
        reads: list[Read],
        results: Sequence[tuple[tuple[int, ...], Index | None]],
        dtype: torch.dtype | None = ...,
    ) -> list[Value]:
        """A step that is no chain of token-wise operations; the values that it makes."""

    def row_step(self, rows: int, width: int, reads: list[Read], emit: Emit, codes: bool = False) -> Matrix:
        """A token-wise step; the matrix that it makes, whose entries may be codes."""
