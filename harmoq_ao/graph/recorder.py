"""What stand-ins ask of the tracer that made them.

Proxies, handles and traced namespaces know the tracer by this protocol alone, so that the tracer can import them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import fx


class Recorder(Protocol):
    """Records the nodes of one forward.

    Attributes:
        graph: The graph that is recorded.
        read: Paths of the attributes that forward has read.
        assigned: Attributes that forward has assigned, by path.
    """

    graph: fx.Graph
    read: set[str]
    assigned: dict[str, Any]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record one node and compute its value on the example."""

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a library function: a node if a proxy or a tensor of the model is involved."""

    def guard(self, proxy: Any, question: str) -> Any:
        """Answer Python's question about a proxy with the example's answer, and record the guard."""

    def attribute(self, value: Any, path: str) -> Any:
        """What ``self.<path>`` is while tracing."""
