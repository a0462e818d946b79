"""An island at run time: the author's module, whose forward picks the traced graph that fits the call.

The module keeps its identity, attributes and parameter names; only its class is exchanged for one derived from the
author's, as ``fully_shard`` does. A call whose pattern or guards no graph fits is traced there and then.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmoq_ao.errors import TraceError
from harmoq_ao.tracing.proxies import GuardFailed
from harmoq_ao.tracing.tracer import SELF, SiteFactory, Variant, dynamic_leaves, trace_island

logger = logging.getLogger(__name__)
_MEMO_SIZE = 256
_lock = threading.RLock()


@dataclass
class IslandState:
    """What an island knows.

    Args:
        qualname: Qualified name of the island in its model.
        site_factory: Gives the site of a contraction; see :class:`~harmoq_ao.tracing.tracer.IslandTracer`.
        quiet: Context in which graphs are tried and traced: no observer may count what it sees there, and the float
            function must be computed.
        verify: Compare each new graph with the author's forward, bit for bit (pointless once sites are quantized).
        finish: Last touch on each new graph, such as constant folding.
        strict: Raise :class:`TraceError` instead of leaving the module float.
        variants: Graphs by calling pattern.
        float_reason: Why the author's forward runs instead, if it does.
    """

    qualname: str
    site_factory: SiteFactory
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext
    verify: bool = True
    finish: Callable[[nn.Module, Variant], Variant] | None = None
    strict: bool = False
    variants: dict[Any, list[Variant]] = field(default_factory=dict)
    float_reason: str | None = None
    memo: OrderedDict[Any, Variant] = field(default_factory=OrderedDict)

    def all_variants(self) -> list[Variant]:
        """Every graph traced so far."""
        return [v for group in self.variants.values() for v in group]


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of an island: run the graph that fits this call, tracing one if none does."""
    state: IslandState = island_state(self)
    if state.float_reason is not None:
        return original_class(self).forward(self, *args, **kwargs)
    leaves, pattern, tree = dynamic_leaves(args, kwargs)
    group = (tuple(pattern), tree)
    key = (group, tuple(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))
    variant = state.memo.get(key)
    if variant is not None:
        try:
            return variant.run(self, *leaves)
        except GuardFailed:  # a guard on values, not on sizes
            del state.memo[key]
    with _lock:
        variant = _find_variant(self, state, group, leaves) or _new_variant(self, state, group, args, kwargs)
    if variant is None:
        return original_class(self).forward(self, *args, **kwargs)
    state.memo[key] = variant
    if len(state.memo) > _MEMO_SIZE:
        state.memo.popitem(last=False)
    return variant.run(self, *leaves)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def make_island(module: nn.Module, state: IslandState) -> None:
    """Turn a module into an island in place: its class becomes one derived from its own, with another forward."""
    cls = type(module)
    if cls not in _classes:  # one base only: a mixin would change the object's layout, which forbids the exchange
        members = {
            "forward": _forward,
            "harmoq_original_class": cls,
            SELF: property(lambda self: self, doc="The island itself, for opaque method calls in its graphs."),
            "__module__": cls.__module__,
        }
        _classes[cls] = type(cls)(f"{cls.__name__}Island", (cls,), members)
    module.__class__ = _classes[cls]
    module.__dict__["_harmoq_island"] = state


def is_island(module: nn.Module) -> bool:
    """Whether ``module`` was turned into an island."""
    return "_harmoq_island" in module.__dict__


def original_class(module: nn.Module) -> type[Any]:
    """The author's class of a module, island or not."""
    return getattr(type(module), "harmoq_original_class", type(module))


def island_state(module: nn.Module) -> IslandState:
    """State of an island."""
    state: IslandState = module.__dict__["_harmoq_island"]
    return state


def _find_variant(module: nn.Module, state: IslandState, group: Any, leaves: list[Any]) -> Variant | None:
    """A graph of the same calling pattern whose guards hold."""
    for variant in state.variants.get(group, []):
        try:
            with state.quiet(), torch.no_grad():
                variant.run(module, *_copies(leaves))
        except GuardFailed:
            continue
        return variant
    return None


def _new_variant(
    module: nn.Module, state: IslandState, group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Variant | None:
    """Trace the call, check the graph against the author's forward bit for bit, and keep it; None leaves it float."""
    try:
        with state.quiet():
            variant = trace_island(module, args, kwargs, state.site_factory)
            if state.verify:
                _verify(module, variant, args, kwargs)
            if state.finish is not None:
                variant = state.finish(module, variant)
    except TraceError as error:
        if state.strict:
            raise
        state.float_reason = str(error)
        logger.warning("%s stays float: %s", type(module).__name__, error)
        return None
    state.variants.setdefault(group, []).append(variant)
    return variant


def _verify(module: nn.Module, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cls = original_class(module)
    with torch.no_grad():
        original_args, original_kwargs = _copy_structure((args, kwargs))
        expected = cls.forward(module, *original_args, **original_kwargs)
        leaves, _, _ = dynamic_leaves(args, kwargs)
        actual = variant.run(module, *_copies(leaves))
    if not _same(expected, actual):
        raise TraceError(f"the graph of {cls.__name__} differs from its forward", remedy="report this module")


def _copies(leaves: list[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _copy_structure(structure: Any) -> Any:
    leaves, tree = pytree.tree_flatten(structure)
    return pytree.tree_unflatten(_copies(leaves), tree)


def _same(expected: Any, actual: Any) -> bool:
    first, first_tree = pytree.tree_flatten(expected)
    second, second_tree = pytree.tree_flatten(actual)
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
            return False
        if isinstance(a, torch.Tensor):
            if a.dtype != b.dtype or not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
                return False
        elif a != b:
            return False
    return True
