"""Free batches: a graph for two images and one for three become one for any number.

Authors compute the number of images from that of windows (``int(windows.shape[0] / (H * W / size / size))``), which an
export with a symbolic batch answers with a number. So the number is found by comparison instead: two graphs of the same
operators, in which an argument is ``2 k`` in one and ``3 k`` in the other, are one graph of ``k`` times the batch.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

PAIR = (2, 3)
"""The batches of the graphs to compare."""
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)


class BatchError(Exception):
    """Why a graph holds for one number of images only."""


def free_batch(two: fx.GraphModule, three: fx.GraphModule) -> None:
    """Let the graph for two images compute any number of them, in place.

    Args:
        two: The graph of a batch of two; its first argument is the image batch.
        three: That of the same model for a batch of three.

    Raises:
        BatchError: The graphs differ in more than numbers that are multiples of the batch.
    """
    nodes, others = list(two.graph.nodes), list(three.graph.nodes)
    if [(n.op, _name(n)) for n in nodes] != [(n.op, _name(n)) for n in others]:
        raise BatchError("other operators are called for other numbers of images")
    partner = dict(zip(nodes, others, strict=True))
    batch = _Batch(two, next(n for n in nodes if n.op == "placeholder"))
    for node, other in partner.items():
        if node.op == "get_attr":
            _check_constant(two, node, three, other)
        node.args = _joined(node, node.args, other.args, batch, partner)
        node.kwargs = _joined(node, node.kwargs, other.kwargs, batch, partner)
    two.graph.lint()
    two.recompile()


class _Batch:
    """Multiples of the batch as nodes, each made once, in front of the graph."""

    def __init__(self, module: fx.GraphModule, image: fx.Node) -> None:
        self._graph, self._last, self._image = module.graph, image, image
        self._known: dict[int, fx.Node] = {}

    def times(self, k: int) -> fx.Node:
        if k not in self._known:
            size = self._make(torch.ops.aten.sym_size.int, (self._image, 0)) if k == 1 else None
            self._known[k] = size or self._make(operator.mul, (self.times(1), k))
        return self._known[k]

    def _make(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.call_function(target, args)
        return self._last


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_function", "call_method") else ""


def _check_constant(two: fx.GraphModule, node: fx.Node, three: fx.GraphModule, other: fx.Node) -> None:
    a, b = _attribute(two, node), _attribute(three, other)
    if isinstance(a, torch.Tensor) and not (a.shape == b.shape and torch.equal(a, b)):
        raise BatchError(f"a constant of shape {tuple(a.shape)} for two images is another one for three")


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _joined(node: fx.Node, a: Any, b: Any, batch: _Batch, partner: dict[fx.Node, fx.Node]) -> Any:
    """The argument that is `a` for two images and `b` for three."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        differing = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if type(x) is int and x != y]
        if len(differing) == 1 and node.target in _VIEWS and -1 not in a:
            return [-1 if i in differing else x for i, x in enumerate(a)]
        return type(a)(_joined(node, x, y, batch, partner) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return {key: _joined(node, a[key], b[key], batch, partner) for key in a}
    if isinstance(a, fx.Node) and partner.get(a) is b:
        return a
    if type(a) is int and type(b) is int and a != b and a % PAIR[0] == 0 and a // PAIR[0] * PAIR[1] == b:
        return batch.times(a // PAIR[0])
    if type(a) is type(b) and not isinstance(a, fx.Node) and a == b:
        return a
    raise BatchError(f"{_name(node)} takes {a} for two images and {b} for three")
