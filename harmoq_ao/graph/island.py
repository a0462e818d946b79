"""An island at run time: the author's module, whose forward picks the traced graph that fits the call.

The module keeps its identity, attributes and parameter names; only its class is exchanged for one derived from the
author's, as ``fully_shard`` does. A call whose pattern or guards no graph fits is traced there and then.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmoq_ao.common.errors import TraceError
from harmoq_ao.graph.exchange import exchange_class
from harmoq_ao.graph.proxies import GuardFailed
from harmoq_ao.graph.tracer import SELF, SiteFactory, Variant, dynamic_leaves, trace_island

logger = logging.getLogger(__name__)
_MEMO_SIZE = 256
_MAX_VARIANTS = 16  # of one calling pattern; an island that meets more forgets the oldest
_VERIFY_SEED = 20
#: Beginnings of the names of buffers that belong to graphs.
DERIVED = ("harmoq_constant_", "harmoq_folded_")
_lock = threading.RLock()


@dataclass
class IslandState:
    """What an island knows.

    Args:
        qualname: Qualified name of the island in its model.
        site_factory: Gives the site of a contraction; see :class:`IslandTracer`.
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
    group = (self.training, tuple(pattern), tree)
    if torch.compiler.is_compiling():
        return _traced_forward(self, state, group, leaves)
    key = (group, tuple(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))
    known = state.memo.get(key)  # only a guess: the guards decide
    if known is not None and known.restartable and known.fits(self):
        try:
            return known.run(self, *leaves)
        except GuardFailed:  # a guard on values, not on sizes; observers may have counted the beginning of this call
            pass
    with _lock:
        result = _try_variants(self, state, group, leaves)
        if result is None and _new_variant(self, state, group, args, kwargs):
            result = _try_variants(self, state, group, leaves)
        if result is not None:
            _remember(state, key, result.variant)
    if result is None:
        return original_class(self).forward(self, *args, **kwargs)
    return result.output if result.complete else result.variant.run(self, *leaves)


def _traced_forward(self: nn.Module, state: IslandState, group: Any, leaves: list[Any]) -> Any:
    """Forward inside `torch.compile` and `torch.export`: of the graphs at hand, with no trial and no lock.

    Raises:
        TraceError: No graph fits the call; one that ran before has one.
    """
    for variant in state.variants.get(group, []):
        if variant.fits(self):
            try:
                return variant.run(self, *leaves)
            except GuardFailed:
                continue
    raise TraceError(
        f"No graph of {original_class(self).__name__} fits this call",
        found=[tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves],
        remedy="run the model once on an image of this size before it is compiled or exported",
    )


def _remember(state: IslandState, key: Any, variant: Variant) -> None:
    state.memo[key] = variant
    while len(state.memo) > _MEMO_SIZE:
        state.memo.popitem(last=False)


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` of an island: graphs hold constants, and rounding those to another type is no use."""
    before = [t.dtype for t in self.parameters()] + [t.dtype for t in self.buffers()]
    result: nn.Module = original_class(self)._apply(self, fn, recurse)
    if before != [t.dtype for t in self.parameters()] + [t.dtype for t in self.buffers()]:
        forget(self)
    return result


def forget(module: nn.Module) -> None:
    """Drop the graphs of an island and the constants that belong to them; they are traced again when needed."""
    state = island_state(module)
    state.variants.clear()
    state.memo.clear()
    for name in [n for n in module._buffers if n.startswith(DERIVED)]:
        del module._buffers[name]


def finish_graphs(module: nn.Module, finish: Callable[[nn.Module, Variant], Variant]) -> None:
    """Give every graph of an island its last touch, those still to be traced as well."""
    state = island_state(module)
    state.variants = {key: [finish(module, v) for v in group] for key, group in state.variants.items()}
    state.memo.clear()
    state.finish = finish


def make_island(module: nn.Module, state: IslandState) -> None:
    """Turn a module into an island in place: its class becomes one derived from its own, with another forward."""
    exchange_class(module, "Island", _island_members)
    module.__dict__["_harmoq_island"] = state


def _island_members(cls: type[nn.Module]) -> dict[str, Any]:
    return {
        "forward": _forward,
        "_apply": _apply,
        "harmoq_original_class": cls,
        SELF: property(lambda self: self, doc="The island itself, for opaque method calls in its graphs."),
    }


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


@dataclass
class _Result:
    """A graph whose guards held, with its output; ``complete`` if that output is the call's."""

    variant: Variant
    output: Any
    complete: bool


def _try_variants(module: nn.Module, state: IslandState, group: Any, leaves: list[Any]) -> _Result | None:
    """The first graph of the same calling pattern whose guards hold.

    A graph that writes before its last guard is tried on copies. Where a trial must be quiet (sites observe), it does
    not count and the caller runs the graph again; elsewhere its output is the call's.
    """
    counts = state.quiet is nullcontext
    for variant in state.variants.get(group, []):
        if not variant.fits(module):
            continue
        complete = counts and variant.restartable
        unseen = nullcontext() if complete else _same_random(leaves)
        try:
            with unseen, state.quiet(), nullcontext() if complete else torch.no_grad():
                output = variant.run(module, *(leaves if complete else _copies(leaves)))
        except GuardFailed:
            continue
        return _Result(variant, output if complete else None, complete)
    return None


def _new_variant(
    module: nn.Module, state: IslandState, group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Trace the call, check the graph against the author's forward bit for bit, and keep it; False leaves it float."""
    try:
        with state.quiet(), _same_random((args, kwargs)):
            variant = trace_island(module, args, kwargs, state.site_factory)
            if state.verify:
                _verify(module, variant, args, kwargs)
            if state.finish is not None:
                variant = state.finish(module, variant)
    except TraceError as error:
        if state.strict:
            raise
        logger.warning("%s stays float: %s", type(module).__name__, error)
        if not state.variants:  # else only calls like this one run as their author wrote them
            state.float_reason = str(error)
        return False
    known = state.variants.setdefault(group, [])
    known.append(variant)
    if len(known) > _MAX_VARIANTS:
        dropped = known.pop(0)
        for key in [k for k, v in state.memo.items() if v is dropped]:
            del state.memo[key]
    return True


def _verify(module: nn.Module, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare outputs, and arguments that were written to; from a random state that the trace did not start from."""
    cls = original_class(module)
    original_args, original_kwargs = _copy_structure((args, kwargs))
    leaves, _, _ = dynamic_leaves(args, kwargs)
    copies = _copies(leaves)
    torch.manual_seed(_VERIFY_SEED)
    with torch.no_grad():
        expected = cls.forward(module, *original_args, **original_kwargs)
        torch.manual_seed(_VERIFY_SEED)
        actual = variant.run(module, *copies)
    written, _, _ = dynamic_leaves(original_args, original_kwargs)
    if not same_values((expected, written), (actual, copies)):
        raise TraceError(f"the graph of {cls.__name__} differs from its forward", remedy="report this module")


@contextmanager
def _same_random(structure: Any) -> Iterator[None]:
    """Within, random numbers may be drawn; afterwards the generators are where they were."""
    tensors = [t for t in pytree.tree_leaves(structure) if isinstance(t, torch.Tensor) and t.device.type == "cuda"]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=sorted({t.device.index for t in tensors})):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _copies(leaves: list[Any]) -> list[Any]:
    """Leaves with tensors cloned; one that occurs twice stays one."""
    clones = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return [clones.get(id(leaf), leaf) for leaf in leaves]


def _copy_structure(structure: Any) -> Any:
    leaves, tree = pytree.tree_flatten(structure)
    return pytree.tree_unflatten(_copies(leaves), tree)


def same_values(expected: Any, actual: Any) -> bool:
    """Whether two nested results hold the same tensors and numbers, in the same structure; NaN equals NaN."""
    first, first_tree = pytree.tree_flatten(expected)
    second, second_tree = pytree.tree_flatten(actual)
    return first_tree == second_tree and all(_same_leaf(a, b) for a, b in zip(first, second, strict=True))


def _same_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a is b or a == b or (a != a and b != b))
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
