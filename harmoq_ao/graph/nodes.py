"""Questions about the nodes of an island's graph, answered from the node and what the tracer noted on it.

The tracer notes in ``node.meta``: ``site`` (the node calls a site), ``writes`` and ``shares`` (indices of the operands
that it writes into, or shares memory with), ``random`` (it drew random numbers) and ``number`` (its value, if an int).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from harmoq_ao.graph.proxies import check_guard

#: Attribute under which an island offers itself, so that an opaque method call has a node for ``self``.
SELF = "harmoq_self"
_PASS_THROUGH = {
    *("dropout", "to", "type_as", "contiguous", "float", "half", "identity", "reshape", "view", "type", "rearrange"),
}
_INPLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem"})
_CONTAINER_WRITES = frozenset(
    {"append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
)
_RANDOM_WORDS = ("rand", "bernoulli", "multinomial", "normal", "uniform_")


def target_name(node: fx.Node) -> str:
    """Name of a node's method, module or function; empty for a callable without one."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_guard(node: fx.Node) -> bool:
    """Whether a node compares an answer with the example's."""
    return node.op == "call_function" and node.target is check_guard


def calls_site(node: fx.Node) -> bool:
    """Whether a node calls a site's module."""
    return bool(node.meta.get("site"))


def called_module(module: nn.Module, node: Any) -> nn.Module | None:
    """The submodule of `module` that a node calls; None for any other node or argument."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return module.get_submodule(str(node.target))


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers: it did on the example, or its name says that it may."""
    return bool(node.meta.get("random")) or any(word in target_name(node) for word in _RANDOM_WORDS)


def writes_by_name(node: fx.Node) -> bool:
    """Whether the name of a node's target says that it writes into its first argument."""
    name = target_name(node)
    if name in _INPLACE_OPERATORS or name in {f"__{n}__" for n in _INPLACE_OPERATORS}:
        return True
    if node.op == "call_method" and name in _CONTAINER_WRITES:
        return True
    if node.op == "call_module":
        return False
    return (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))


def ancestors(node: fx.Node, stop: Callable[[fx.Node], bool] = lambda _: False) -> Iterator[fx.Node]:
    """A node and all that it is computed from, except what lies behind a node that `stop` accepts."""
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        yield current
        if not stop(current):
            fresh = [n for n in current.all_input_nodes if n not in seen]
            seen.update(fresh)
            todo.extend(fresh)


def depends_on_input(node: fx.Node) -> bool:
    """Whether a placeholder is among the ancestors of a node."""
    return any(n.op == "placeholder" for n in ancestors(node))


def comes_from_softmax(node: fx.Node | None, root: nn.Module) -> bool:
    """Whether a node is an attention map: a softmax, perhaps followed by dropout, casts or views."""
    for _ in range(8):
        if node is None:
            return False
        name = target_name(node)
        if node.op == "call_module":
            name = type(root.get_submodule(name)).__name__.lower()
        if name == "softmax":
            return True
        if name not in _PASS_THROUGH:
            return False
        node = next((a for a in node.args if isinstance(a, fx.Node)), None)
    return False


def is_restartable(graph: fx.Graph) -> bool:
    """Whether no guard comes after a write, so that a failed guard leaves the arguments as they were."""
    guards = [i for i, n in enumerate(graph.nodes) if n.target is check_guard]
    writes = [i for i, n in enumerate(graph.nodes) if n.meta.get("writes")]
    return not guards or not writes or writes[0] > guards[-1]


def writes_arguments(graph: fx.Graph) -> bool:
    """Whether a graph writes into what shares memory with its arguments."""
    shared: set[fx.Node] = set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        if any(operands[i] in shared for i in node.meta.get("writes", ())):
            return True
        if node.op == "placeholder" or any(operands[i] in shared for i in node.meta.get("shares", ())):
            shared.add(node)
    return False


def run_node(module: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The value of one node, given the values of its arguments."""
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
