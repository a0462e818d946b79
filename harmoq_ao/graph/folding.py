"""Constant folding: what an island computes from parameters alone is computed once.

Position-bias tables (a small network on fixed coordinates, a gather, a permutation) do not depend on the image. In an
island's graph every node without a placeholder among its ancestors is such a constant; the last ones before the rest of
the graph become buffers. Outside of islands, a module whose input is the same for every image keeps its last result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.graph.exchange import exchange_class
from harmoq_ao.graph.island import original_class
from harmoq_ao.graph.proxies import check_guard
from harmoq_ao.graph.tracer import SELF, Variant, compile_graph, op_of_site

_PREFIX = "harmoq_folded_"


def fold_variant(module: nn.Module, variant: Variant) -> Variant:
    """The same graph with its constant parts replaced by buffers of the island (not persistent: they are derived).

    Args:
        module: The island, with the parameters it will run with.
        variant: One of its graphs; left as it is.
    """
    graph = fx.Graph()
    output = graph.graph_copy(variant.graph, {})
    graph.output(output)
    constant = _constant_nodes(graph)
    for node in [n for n in graph.nodes if _is_guard(n) and n.args[0] in constant]:
        graph.erase_node(node)  # it held when the constant was computed
    edges = [n for n in constant if n.op != "get_attr" and any(u not in constant for u in n.users)]
    edges = [n for n in edges if not any(u.op == "output" for u in n.users)]  # the caller may write into a result
    if not edges:
        return variant
    values = _evaluate(module, graph, constant, edges)
    for node in edges:
        value = values[node]
        if not isinstance(value, Tensor):
            continue
        name = _buffer(module, value)
        with graph.inserting_before(node):
            replacement = graph.create_node("get_attr", name)
        node.replace_all_uses_with(replacement)
    _drop_dead(graph)
    return replace(variant, graph=graph, run=compile_graph(graph, original_class(module)))


def remember(module: nn.Module) -> None:
    """Let a module keep its last result and return it as long as its input is the same, tensor for tensor.

    Its class is exchanged for one derived from its own, so that names of parameters stay.
    """
    if "harmoq_forward" in vars(type(module)):
        return
    exchange_class(module, "Remembered", lambda cls: {"forward": _remembered_forward, "harmoq_forward": cls.forward})


def _remembered_forward(self: nn.Module, input: Tensor) -> Any:
    last: tuple[Tensor, Tensor, int] | None = self.__dict__.get("_harmoq_last")
    if last is not None and last[1]._version == last[2] and _same(last[0], input):  # nobody wrote into the result
        return last[1]
    result = self.harmoq_forward(input)  # type: ignore[operator]
    self.__dict__["_harmoq_last"] = (input.detach().clone(), result, result._version)
    return result


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes computed from parameters, buffers and Python constants alone, and from nothing that is written to."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or _is_guard(node) or node.target is setattr:
            continue
        if (node.op == "get_attr" and node.target == SELF) or _is_random(node):
            continue
        if node.op == "call_module" and op_of_site(node.target) is not None:
            continue
        if all(n in constant for n in node.all_input_nodes):
            constant.add(node)
    return constant - _written(graph, constant)


def _written(graph: fx.Graph, constant: set[fx.Node]) -> set[fx.Node]:
    """Nodes that share memory with one that is written to, and the constants made from them."""
    shares: dict[fx.Node, set[fx.Node]] = {n: set() for n in graph.nodes}
    spoiled: set[fx.Node] = set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        for index in node.meta.get("shares", ()):
            shares[node].add(operands[index])
            shares[operands[index]].add(node)
        spoiled.update(operands[index] for index in node.meta.get("writes", ()))
    todo = list(spoiled)
    while todo:
        current = todo.pop()
        made = {u for u in current.users if u in constant}
        for other in (shares[current] | made) - spoiled:
            spoiled.add(other)
            todo.append(other)
    return spoiled


def _is_random(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    drawn = any(word in name for word in ("rand", "bernoulli", "multinomial", "normal", "uniform_"))
    return bool(node.meta.get("random")) or drawn


def _is_guard(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is check_guard


def _evaluate(module: nn.Module, graph: fx.Graph, constant: set[fx.Node], edges: list[fx.Node]) -> dict[fx.Node, Any]:
    wanted = set(edges)
    for node in reversed(list(graph.nodes)):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node in wanted:
                args = fx.node.map_arg(node.args, lambda n: values[n])
                kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
                values[node] = run_node(module, node, args, kwargs)
    return values


def run_node(module: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "get_attr":
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part) if isinstance(value, nn.Module) else value[int(part)]
        return value
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return module.get_submodule(str(node.target))(*args, **kwargs)


def _buffer(module: nn.Module, value: Tensor) -> str:
    """Name of a buffer of the island that holds `value`; equal tables of several graphs are kept once."""
    value = value.detach()
    count = 0
    for name, buffer in module._buffers.items():
        if name.startswith(_PREFIX):
            count += 1
            if buffer is not None and _same(buffer, value):
                return name
    module.register_buffer(f"{_PREFIX}{count}", value.clone(), persistent=False)
    return f"{_PREFIX}{count}"


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        kept = node.op in ("placeholder", "output") or _is_guard(node) or node.target is setattr
        if not node.users and not kept and not node.meta.get("writes") and not node.meta.get("random"):
            graph.erase_node(node)
