"""One call of an island to one :class:`Variant`: run the author's forward on proxies, again and again if need be.

A helper of the author that cannot be followed becomes one opaque node, and the trace starts over.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import traceback
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmoq_ao.common.errors import TraceError
from harmoq_ao.graph.derived import DerivedBuffers
from harmoq_ao.graph.exchange import original_class
from harmoq_ao.graph.handles import ModuleHandle
from harmoq_ao.graph.namespaces import activate, package_of, traced_globals
from harmoq_ao.graph.nodes import is_restartable
from harmoq_ao.graph.proxies import ValueProxy
from harmoq_ao.graph.tracer import IslandTracer, SiteFactory, is_machinery
from harmoq_ao.graph.variant import BY_VALUE, Variant, compile_graph

logger = logging.getLogger(__name__)
_MAX_RESTARTS = 24


def trace_island(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    site_factory: SiteFactory,
    derived: DerivedBuffers | None = None,
) -> Variant:
    """Trace ``root``'s own forward on example arguments.

    Helpers that cannot be followed become one opaque node, one by one, innermost of the author's own first.

    Args:
        root: Module whose forward is traced; its class is the author's, or an island class over it.
        args: Example positional arguments; tensors and numbers become placeholders, everything else is specialised.
        kwargs: Example keyword arguments.
        site_factory: See :class:`IslandTracer`.
        derived: See :class:`IslandTracer`.

    Raises:
        TraceError: The forward cannot be traced; the message names file, line and reason.
    """
    cls = original_class(root)
    derived = DerivedBuffers() if derived is None else derived
    opaque: list[tuple[dict[str, Any], str]] = []
    for _ in range(_MAX_RESTARTS):
        helpers = frozenset(namespace[name] for namespace, name in opaque)
        tracer = IslandTracer(root, site_factory, derived, helpers)
        try:
            with torch.no_grad(), traced_globals(cls, opaque):
                _record(tracer, cls, args, kwargs)
            return Variant(
                tracer.graph,
                compile_graph(tracer.graph, cls),
                tracer.contractions,
                tuple(name for _, name in opaque),
                tuple(dict.fromkeys(tracer.hidden)),
                tracer.plain_reads(),
                is_restartable(tracer.graph),
            )
        except Exception as error:  # whatever an author's Python raises on a proxy
            helper = _failing_helper(error, cls)
            if helper is None or any(h[0] is helper[0] and h[1] == helper[1] for h in opaque):
                raise TraceError(f"{cls.__name__}.forward cannot be traced", found=_reason(error)) from error
            logger.debug("%s: %s becomes opaque (%s)", cls.__name__, helper[1], _reason(error))
            opaque.append(helper)
    raise TraceError(f"{cls.__name__}.forward cannot be traced", found=f"more than {_MAX_RESTARTS} opaque helpers")


def _record(tracer: IslandTracer, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    inputs: list[Any] = []
    known: dict[int, ValueProxy] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) or type(leaf) in (int, float):
            node = tracer.graph.create_node("placeholder", f"leaf_{sum(isinstance(i, ValueProxy) for i in inputs)}")
            if isinstance(leaf, torch.Tensor):
                inputs.append(known.setdefault(id(leaf), ValueProxy(node, tracer, leaf.detach().clone())))
            else:
                inputs.append(ValueProxy(node, tracer, leaf))
        elif _specialisable(leaf):
            inputs.append(leaf)
        else:
            raise TraceError("An argument may change without notice", found=f"a {type(leaf).__name__}")
    proxy_args, proxy_kwargs = pytree.tree_unflatten(inputs, tree)
    handle = ModuleHandle(tracer, tracer.root, "")
    with activate(tracer):
        output = cls.forward(handle, *proxy_args, **proxy_kwargs)  # type: ignore[attr-defined]
    tracer.graph.create_node("output", "output", (tracer.create_arg(output),), {})


def _specialisable(leaf: Any) -> bool:
    return isinstance(leaf, (*BY_VALUE, nn.Module, type)) or callable(leaf)


def _failing_helper(error: Exception, cls: type) -> tuple[dict[str, Any], str] | None:
    """The innermost author helper on the way to an error, as (globals, name) of the reference that called it."""
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    home = package_of(cls.__module__)
    author = [f for f in frames if package_of(f.f_globals.get("__name__", "")) == home]
    for caller, callee in reversed(list(itertools.pairwise(author))):
        for name, value in caller.f_globals.items():
            if getattr(inspect.unwrap(value) if callable(value) else None, "__code__", None) is callee.f_code:
                return caller.f_globals, name
    return None


def _reason(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_machinery(f.filename)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
