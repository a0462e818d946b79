"""Constant folding: what an island computes from parameters alone is computed once.

Position-bias tables (a small network on fixed coordinates, a gather, a permutation) do not depend on the image. In an
island's graph every node without a placeholder among its ancestors is such a constant; the last ones before the rest of
the graph become buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.graph.island import island_state
from harmoq_ao.graph.nodes import SELF, calls_site, is_guard, is_random, run_node
from harmoq_ao.graph.variant import Variant


def fold_variant(module: nn.Module, variant: Variant) -> Variant:
    """The same graph with its constant parts replaced by buffers of the island (not persistent: they are derived).

    Args:
        module: The island, with the parameters it will run with.
        variant: One of its graphs; left as it is.
    """
    graph = variant.copied_graph()
    constant = _constant_nodes(graph)
    for node in [n for n in graph.nodes if is_guard(n) and n.args[0] in constant]:
        graph.erase_node(node)  # a constant gives the same answer in every call
    inner = [n for n in graph.nodes if n in constant and n.op != "get_attr"]
    edges = [n for n in inner if any(u not in constant for u in n.users)]
    edges = [n for n in edges if not any(u.op == "output" for u in n.users)]  # the caller may write into a result
    if not edges:
        return variant
    values = _evaluate(module, graph, constant, edges)
    for node in edges:
        value = values[node]
        if not isinstance(value, Tensor):
            continue
        name = island_state(module).derived.add_folded(module, value)
        with graph.inserting_before(node):
            replacement = graph.create_node("get_attr", name)
        node.replace_all_uses_with(replacement)
    _drop_dead(graph)  # not fx's elimination of dead code, which would drop guards and writes as well
    return variant.with_graph(module, graph)


def _constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes computed from parameters, buffers and Python constants alone, and from nothing that is written to."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or is_guard(node) or node.target is setattr:
            continue
        if (node.op == "get_attr" and node.target == SELF) or is_random(node):
            continue
        if calls_site(node):
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


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        kept = node.op in ("placeholder", "output") or is_guard(node) or node.target is setattr
        if not node.users and not kept and not node.meta.get("writes") and not node.meta.get("random"):
            graph.erase_node(node)
