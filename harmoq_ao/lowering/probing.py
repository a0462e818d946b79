"""Probing: what a module computes around its contractions, found by running it with stand-ins for them.

A fused kernel may only replace a module that does exactly what the kernel does. Authors write the same attention in
many ways, so the way is not compared but the effect: every contraction returns random numbers, what reaches the next
one is recorded, and it must be what the kernel would have computed from them. Between contractions there is only data
movement, a factor, a softmax or a GELU; random numbers tell any two of those apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.graph.nodes import called_module, run_node
from harmoq_ao.lowering.attention import fused_attention, sum_of
from harmoq_ao.lowering.attention_matching import is_softmax
from harmoq_ao.sites.prepared import PreparedMatmul
from harmoq_ao.sites.quantized import QuantizedLinear, QuantizedMatmul

_CONTRACTIONS = (QuantizedLinear, QuantizedMatmul, PreparedMatmul)


@dataclass
class Call:
    """One contraction, or one softmax, that a probed graph went through.

    Args:
        kind: ``linear``, ``matmul``, ``attention`` (scores, softmax and values in one call) or ``softmax``.
        name: Name of the module in the graph; empty for functions.
        inputs: Its operands, as they were then.
        output: What it returned: what stands for the contraction, for a softmax its result.
    """

    kind: str
    name: str
    inputs: tuple[Any, ...]
    output: Tensor


Stand = Callable[[str, tuple[int, ...]], Tensor]
"""Makes the result of a contraction from its kind and shape."""


def random_results(seed: int) -> Stand:
    """Normal random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda kind, shape: torch.randn(shape, generator=generator)


@torch.no_grad()
def probe(module: nn.Module, graph: fx.Graph, leaves: list[Any], stand: Stand) -> tuple[list[Call], Any]:
    """Run a graph with `stand` for its contractions.

    Args:
        module: What the graph belongs to.
        graph: Its graph; it may hold guards.
        leaves: Values of its placeholders, in order.
        stand: Makes the results of contractions.

    Returns:
        The calls in order, and the output.

    Raises:
        GuardFailed: A guard of the graph does not hold for these leaves.
    """
    calls: list[Call] = []
    values: dict[fx.Node, Any] = {}
    given = iter(leaves)
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "placeholder":
            values[node] = next(given, *args)  # an argument that is not given has its default
        elif node.op == "output":
            return calls, args[0]
        else:
            values[node] = _step(module, node, args, kwargs, stand, calls)
    return calls, None


def _step(module: nn.Module, node: fx.Node, args: Any, kwargs: Any, stand: Stand, calls: list[Call]) -> Any:
    def stand_in(kind: str, name: str, *shape: int) -> Tensor:
        output = stand(kind, shape)
        calls.append(Call(kind, name, _copies(operands), output))
        return output.clone()  # the graph may write into it

    operands = args
    if node.target is fused_attention:
        query, key, value, *terms = args
        operands = query, key, value, sum_of(terms)
        batch = torch.broadcast_shapes(query.shape[:-2], value.shape[:-2])
        return stand_in("attention", "", *batch, query.shape[-2], value.shape[-1])
    contraction = called_module(module, node)
    if isinstance(contraction, QuantizedLinear):
        return stand_in("linear", str(node.target), *args[0].shape[:-1], contraction.site.shape[0])
    if isinstance(contraction, (QuantizedMatmul, PreparedMatmul)) and contraction.form.op == "matmul":
        left, right = args
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        return stand_in("matmul", str(node.target), *batch, left.shape[-2], right.shape[-1])
    before = _copies(args) if is_softmax(module, node) else None
    result = run_node(module, node, args, kwargs)
    if before is not None:
        calls.append(Call("softmax", str(node.target), before, result.clone()))
    return result


def _copies(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.clone() if isinstance(v, Tensor) else v for v in values)
