"""Modules outside of islands whose input is the same for every image keep their last result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harmoq_ao.graph.derived import same_tensor
from harmoq_ao.graph.exchange import Replacement, exchange, original_class, replacement_of


@dataclass
class LastResult(Replacement):
    """The last call of a module of one input.

    Attributes:
        last: A copy of its input, its result, and the result's version then; one tuple, as threads may share a module.
    """

    last: tuple[Tensor, Tensor, int] | None = None

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The last result if the input is the same, tensor for tensor, and nobody wrote into the result."""
        (x,) = (*args, *kwargs.values())
        last = self.last
        if last is not None and last[1]._version == last[2] and same_tensor(last[0], x):
            return last[1]
        result: Tensor = original_class(module).forward(module, x)
        self.last = (x.detach().clone(), result, result._version)
        return result

    def to_pickle(self) -> LastResult:
        return LastResult()

    def forget(self, module: nn.Module) -> None:
        self.last = None


def remember(module: nn.Module) -> None:
    """Let a module, in place, return its last result as long as its input is the same."""
    if replacement_of(module, Replacement) is None:
        exchange(module, LastResult())
