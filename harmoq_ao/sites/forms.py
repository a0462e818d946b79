"""The ways authors write a product of two activations, and the canonical form in which it is quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.graph.contractions import EinsumForm, einsum_form

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "matmul": torch.matmul,
    "bmm": torch.bmm,
    "mm": torch.mm,
    "baddbmm": torch.baddbmm,
}


@dataclass(frozen=True)
class MatmulForm:
    """How the author wrote a product: ``matmul``, ``bmm``, ``mm``, ``baddbmm`` or an einsum equation.

    Args:
        op: Name of the function.
        equation: Equation of an einsum.
    """

    op: str
    equation: str | None = None

    def original(self, *operands: Tensor, **options: Any) -> Tensor:
        """The author's own call, unchanged."""
        if self.op == "einsum":
            return torch.einsum(self.equation, *operands)
        return _FUNCTIONS[self.op](*operands, **options)

    def canonical(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """The two operands as `[..., M, K]` and `[..., K, N]`."""
        a, b = operands[-2:]
        return (a, b) if self.op != "einsum" else self._einsum().operands(a, b)

    def finish(self, product: Tensor, *operands: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        """The result of the author's call, from the canonical product `[..., M, N]`."""
        if self.op == "einsum":
            return self._einsum().result(product, *operands)
        if self.op == "baddbmm":
            return beta * operands[0] + alpha * product
        return product

    def _einsum(self) -> EinsumForm:
        form = einsum_form(str(self.equation))
        assert form is not None  # only equations with such a form become sites
        return form
