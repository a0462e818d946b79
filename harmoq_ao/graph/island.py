"""An island at run time: the author's module, whose forward picks the traced graph that fits the call.

The module keeps its identity, attributes and parameter names; only its class is exchanged. A call whose pattern or
guards no graph fits is traced there and then.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from harmoq_ao.common.errors import TraceError
from harmoq_ao.common.tracing import is_recording
from harmoq_ao.graph.calls import copies, copy_structure, dynamic_leaves, leaf_shapes, same_random, same_values
from harmoq_ao.graph.derived import DerivedBuffers
from harmoq_ao.graph.exchange import Replacement, exchange, original_class, replacement_of
from harmoq_ao.graph.proxies import GuardFailed
from harmoq_ao.graph.torch_attention import without_fast_path
from harmoq_ao.graph.trace import trace_island
from harmoq_ao.graph.tracer import SiteFactory
from harmoq_ao.graph.variant import Pass, Variant

logger = logging.getLogger(__name__)
_MEMO_SIZE = 256
_MAX_VARIANTS = 16  # of one calling pattern; an island that meets more forgets the oldest
_VERIFY_SEED = 20
_lock = threading.RLock()


class Phase(Enum):
    """What an island's sites do, and hence what a trial of a graph may do."""

    #: Sites may observe or fake-quantize. Graphs are tried and traced quietly, where nothing counts and the float
    #: function is computed; a new graph is compared with the author's forward, bit for bit.
    OBSERVING = "observing"
    #: Sites only compute, no longer the author's function. The output of a trial is the call's.
    CONVERTED = "converted"


@dataclass
class IslandState(Replacement):
    """Everything that an island knows.

    Args:
        qualname: Qualified name of the island in its model.
        site_factory: Gives the site of a contraction; see :class:`IslandTracer`.
        quiet: Context in which sites compute the float function and do not observe.
        strict: Raise :class:`TraceError` instead of leaving the module float.
        phase: What the sites do.
        passes: What each new graph goes through, such as constant folding.
        variants: Graphs by calling pattern.
        float_reason: Why the author's forward runs instead, if it does.
        refused: Why it did in some call, beside others that have a graph.
        memo: The graph that fitted a call, by pattern, shapes and numbers.
        derived: Buffers that belong to the graphs.
    """

    qualname: str
    site_factory: SiteFactory
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext
    strict: bool = False
    phase: Phase = Phase.OBSERVING
    passes: tuple[Pass, ...] = ()
    variants: dict[Any, list[Variant]] = field(default_factory=dict)
    float_reason: str | None = None
    refused: str | None = None
    memo: OrderedDict[Any, Variant] = field(default_factory=OrderedDict)
    derived: DerivedBuffers = field(default_factory=DerivedBuffers)

    def all_variants(self) -> list[Variant]:
        """Every graph traced so far."""
        return [v for group in self.variants.values() for v in group]

    def to_pickle(self) -> IslandState:
        """Without graphs, which hold generated code, and what was made for them: they are traced when needed."""
        empty: dict[str, Any] = {"variants": {}, "memo": OrderedDict(), "derived": DerivedBuffers()}
        return replace(self, **empty)

    def own_buffers(self) -> list[str]:
        return [*self.derived.constants, *self.derived.folded]

    def forget(self, module: nn.Module) -> None:
        """Drop the graphs, their constants and what kernels made of them; they are traced again when needed."""
        self.variants.clear()
        self.memo.clear()
        self.derived.clear(module)

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph that fits this call, tracing one if none does."""
        if self.float_reason is not None:
            return original_class(module).forward(module, *args, **kwargs)
        leaves, pattern, tree = dynamic_leaves(args, kwargs)
        group = (module.training, tuple(pattern), tree)
        if torch.compiler.is_compiling():
            return self._compiled_forward(module, group, leaves)
        key = (group, leaf_shapes(leaves))
        known = self.memo.get(key)  # only a guess: the guards decide
        if known is not None and known.restartable and known.fits(module):
            try:
                return known(module, *leaves)
            except GuardFailed:  # a guard on values, not on sizes; observers may have counted the call's beginning
                pass
        with _lock:
            result = self._try_variants(module, group, leaves)
            if result is None and self._new_variant(module, group, args, kwargs):
                result = self._try_variants(module, group, leaves)
            if result is not None:
                self._remember(key, result.variant)
        if result is None:
            return original_class(module).forward(module, *args, **kwargs)
        return result.output if result.complete else result.variant(module, *leaves)

    def _compiled_forward(self, module: nn.Module, group: Any, leaves: list[Any]) -> Any:
        """Forward inside `torch.compile` and `torch.export`: of the graphs at hand, with no trial and no lock.

        Raises:
            TraceError: No graph fits the call; one that ran before has one.
        """
        for variant in self.variants.get(group, []):
            if variant.fits(module):
                try:
                    return variant(module, *leaves)
                except GuardFailed:
                    continue
        raise TraceError(
            f"No graph of {original_class(module).__name__} fits this call",
            found=[tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves],
            remedy="run the model once on an image of this size before it is compiled or exported",
        )

    def _remember(self, key: Any, variant: Variant) -> None:
        self.memo[key] = variant
        while len(self.memo) > _MEMO_SIZE:
            self.memo.popitem(last=False)

    def _try_variants(self, module: nn.Module, group: Any, leaves: list[Any]) -> _Result | None:
        """The first graph of the same calling pattern whose guards hold.

        A graph that writes before its last guard is tried on copies. While sites observe, a trial does not count and
        the caller runs the graph again; afterwards its output is the call's.
        """
        for variant in self.variants.get(group, []):
            if not variant.fits(module):
                continue
            complete = self.phase is Phase.CONVERTED and variant.restartable
            unseen = nullcontext() if complete else same_random(leaves)
            try:
                with unseen, self._quiet(), nullcontext() if complete else torch.no_grad():
                    output = variant(module, *(leaves if complete else copies(leaves)))
            except GuardFailed:
                continue
            return _Result(variant, output if complete else None, complete)
        return None

    def _quiet(self) -> AbstractContextManager[Any]:
        return self.quiet() if self.phase is Phase.OBSERVING else nullcontext()

    def _new_variant(self, module: nn.Module, group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Trace the call, check the graph and keep it; False if this call runs as its author wrote it."""
        try:
            with self._quiet(), same_random((args, kwargs)), without_fast_path():
                variant = trace_island(module, args, kwargs, self.site_factory, self.derived)
                if self.phase is Phase.OBSERVING:
                    _verify(module, variant, args, kwargs)
                variant = _passed(module, variant, self.passes)
        except TraceError as error:
            if self.strict or is_recording():  # stand-ins without values say nothing about real calls
                raise
            logger.warning("%s stays float: %s", type(module).__name__, error)
            if not self.variants:  # else only calls like this one run as their author wrote them
                self.float_reason = str(error)
            else:
                self.refused = str(error)
            return False
        known = self.variants.setdefault(group, [])
        known.append(variant)
        if len(known) > _MAX_VARIANTS:
            dropped = known.pop(0)
            for key in [k for k, v in self.memo.items() if v is dropped]:
                del self.memo[key]
        return True


@dataclass
class _Result:
    """A graph whose guards held, with its output; ``complete`` if that output is the call's."""

    variant: Variant
    output: Any
    complete: bool


def make_island(module: nn.Module, state: IslandState) -> None:
    """Turn a module into an island in place."""
    exchange(module, state)


def is_island(module: nn.Module) -> bool:
    """Whether ``module`` was turned into an island."""
    return replacement_of(module, IslandState) is not None


def island_state(module: nn.Module) -> IslandState:
    """State of an island."""
    state = replacement_of(module, IslandState)
    assert state is not None
    return state


def finish_graphs(module: nn.Module, passes: tuple[Pass, ...]) -> None:
    """Put every graph of an island through passes, those still to be traced as well; nothing where that was done."""
    state = island_state(module)
    if state.passes == passes:
        return
    state.variants = {key: [_passed(module, v, passes) for v in group] for key, group in state.variants.items()}
    state.memo.clear()
    state.passes = passes


def _passed(module: nn.Module, variant: Variant, passes: tuple[Pass, ...]) -> Variant:
    for step in passes:
        variant = step(module, variant)
    return variant


def _verify(module: nn.Module, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare outputs, and arguments that were written to; from a random state that the trace did not start from."""
    cls = original_class(module)
    original_args, original_kwargs = copy_structure((args, kwargs))
    leaves, _, _ = dynamic_leaves(args, kwargs)
    own = copies(leaves)
    torch.manual_seed(_VERIFY_SEED)
    with torch.no_grad():
        expected = cls.forward(module, *original_args, **original_kwargs)
        torch.manual_seed(_VERIFY_SEED)
        actual = variant(module, *own)
    written, _, _ = dynamic_leaves(original_args, original_kwargs)
    if not same_values((expected, written), (actual, own)):
        raise TraceError(f"the graph of {cls.__name__} differs from its forward", remedy="report this module")
