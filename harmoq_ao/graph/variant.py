"""One traced graph of an island, compiled to a function of the live module."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from harmoq_ao.graph.exchange import original_class

_counter = itertools.count()
_MISSING = object()
#: Immutable values that a graph may be specialised to. Modules and callables count too, by identity.
BY_VALUE = (str, bytes, bool, complex, type(None), torch.Size, torch.dtype, torch.device, np.generic, range)


@dataclass(frozen=True, eq=False)
class Variant:
    """One traced calling pattern of an island; call it with the live island and the dynamic leaves of its arguments.

    Args:
        graph: The FX graph; its ``call_module`` targets are attributes of the island. Never changed: passes copy it.
        run: The compiled graph, with the arguments of the variant itself.
        contractions: Number of contractions that became sites or were deliberately left as plain calls.
        opaque: Names of helpers that became one opaque node.
        hidden: Contractions inside opaque nodes, as ``helper: operation``; they stay float.
        reads: Plain attributes of the island that its forward read, with the values the graph was specialised to.
        restartable: No guard comes after a write into a tensor, so that a run that ends in :class:`GuardFailed` has
            left its arguments as they were.
    """

    graph: fx.Graph
    run: Callable[..., Any]
    contractions: int
    opaque: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    reads: tuple[tuple[str, Any], ...] = ()
    restartable: bool = True

    def __call__(self, module: nn.Module, *leaves: Any) -> Any:
        return self.run(module, *leaves)

    def fits(self, module: nn.Module) -> bool:
        """Whether the plain attributes of the live module are still those the graph was specialised to."""
        return all(unchanged(read_attribute(module, path), value) for path, value in self.reads)

    def copied_graph(self) -> fx.Graph:
        """A copy of the graph, for a pass to change."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return graph

    def with_graph(self, module: nn.Module, graph: fx.Graph) -> Variant:
        """The same calling pattern of `module` computed by another graph."""
        return replace(self, graph=graph, run=compile_graph(graph, original_class(module)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        """A graph is shared by the copies of an island: the module is an argument."""
        return self


#: Derives a variant from another one, given the island with the parameters it will run with.
Pass = Callable[[nn.Module, Variant], Variant]


def compile_graph(graph: fx.Graph, cls: type) -> Callable[..., Any]:
    """Compile a graph into a function of the live module (visible to tracebacks through linecache)."""
    code = graph.python_code("self")
    filename = f"<island {cls.__name__} {next(_counter)}>"
    scope = dict(code.globals)
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    exec(compile(code.src, filename, "exec"), scope)  # the graph's own generated code
    forward: Callable[..., Any] = scope["forward"]
    return forward


def read_attribute(module: nn.Module, path: str) -> Any:
    """The current value of ``module.<path>``; a missing one equals no value that a graph is specialised to."""
    value: Any = module
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, (list, tuple)) else getattr(value, part)
        except (AttributeError, IndexError, ValueError):
            return _MISSING
    return value


def unchanged(now: Any, before: Any) -> bool:
    """Equality of plain values by content, of everything else by identity."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(unchanged(a, b) for a, b in zip(now, before, strict=True))
    if isinstance(now, dict):
        return list(now) == list(before) and all(unchanged(now[k], before[k]) for k in now)
    if isinstance(now, (int, float, *BY_VALUE, set, slice)):
        return bool(now == before or (now != now and before != before))
    return False
