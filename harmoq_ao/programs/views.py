"""Tensors that lie in another's memory: what a write into one of them makes of the other, without a write."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_SAME = {_aten.alias.default, _aten.detach.default}
_RESHAPES = {
    *(_aten.view.default, _aten._unsafe_view.default, _aten.unsqueeze.default),
    *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims),
}
_SPLITS = {_aten.split.Tensor, _aten.split_with_sizes.default}


@dataclass(frozen=True, eq=False)
class View:
    """How a tensor comes from the one in whose memory it lies.

    Attributes:
        source: That one.
        target: The operator.
        args: After the source.
        kwargs: By name.
        part: Which of several results it is; None of the only one.
    """

    source: Tensor
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None

    def written(self, graph: fx.Graph, source: fx.Node, new: fx.Node) -> fx.Node | None:
        """The source once the tensor has a new value; None where no operator gives it.

        Args:
            graph: Where to add operators.
            source: The source before.
            new: The tensor's new value.
        """
        if self.target in _SAME:
            return new
        if self.target in _RESHAPES:
            return graph.call_function(_aten.reshape.default, (new, list(self.source.shape)))
        if self.target is _aten.permute.default:
            order = [axis % self.source.dim() for axis in self.args[0]]
            return graph.call_function(_aten.permute.default, (new, [order.index(i) for i in range(len(order))]))
        if self.target in (_aten.transpose.int, _aten.t.default):
            return graph.call_function(self.target, (new, *self.args))
        if self.target is _aten.select.int:
            return graph.call_function(_aten.select_scatter.default, (source, new, *self.args))
        if self.target is _aten.slice.Tensor:
            return graph.call_function(_aten.slice_scatter.default, (source, new, *self.args))
        if self.part is None:
            return None
        axis = int(self.args[1] if len(self.args) > 1 else self.kwargs.get("dim", 0))
        if self.target is _aten.unbind.int:
            axis = int(self.args[0] if self.args else self.kwargs.get("dim", 0))
            return graph.call_function(_aten.select_scatter.default, (source, new, axis, self.part))
        if self.target in _SPLITS:
            start, end = self._between(axis)
            return graph.call_function(_aten.slice_scatter.default, (source, new, axis, start, end))
        return None

    def _between(self, axis: int) -> tuple[int, int]:
        """Where a part of a split begins and ends."""
        assert self.part is not None
        sizes, length = self.args[0], self.source.shape[axis]
        ends = list(accumulate(sizes)) if isinstance(sizes, (list, tuple)) else [*range(sizes, length, sizes), length]
        return ([0, *ends])[self.part], ends[self.part]
