"""Buffers of an island that belong to its graphs, not to its author: derived from parameters, never saved."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class DerivedBuffers:
    """Names of the buffers that an island's graphs read.

    Attributes:
        constants: Of tensors that a forward met and that are not attributes of the module.
        folded: Of results that constant folding computed.
    """

    constants: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)

    def add_constant(self, module: nn.Module, value: Tensor) -> str:
        """Name of a new buffer of `module` with the values of a tensor."""
        return self._add(module, self.constants, f"harmoq_constant_{len(self.constants)}", value)

    def add_folded(self, module: nn.Module, value: Tensor) -> str:
        """Name of a buffer of `module` that holds `value`; equal tables of several graphs are kept once."""
        for name in self.folded:
            if same_tensor(module.get_buffer(name), value):
                return name
        return self._add(module, self.folded, f"harmoq_folded_{len(self.folded)}", value)

    def clear(self, module: nn.Module) -> None:
        """Delete them all."""
        for name in (*self.constants, *self.folded):
            del module._buffers[name]
        self.constants.clear()
        self.folded.clear()

    @staticmethod
    def _add(module: nn.Module, names: list[str], name: str, value: Tensor) -> str:
        module.register_buffer(name, value.detach().clone(), persistent=False)
        names.append(name)
        return name


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, type, device and values."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
