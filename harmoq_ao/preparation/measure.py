"""What the prepared model does on the examples: it equals the original, and its sites learn their sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from harmoq_ao.common.errors import TraceError
from harmoq_ao.graph import Discovery, IslandState, is_island, island_state, same_values
from harmoq_ao.preparation.first_runs import Run, run
from harmoq_ao.preparation.site_factory import SiteFactory, without_folders
from harmoq_ao.sites.attention import PreparedAttention
from harmoq_ao.sites.base import PreparedSite, quiet
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.site import FloatCause, FloatReason, FloatSite

_UNREACHED = FloatReason(FloatCause.UNREACHED, "no example image reached it")


def measure(prepared: PreparedModel, runs: list[Run], found: Discovery) -> None:
    """Trace every island; learn execution order, multiply-accumulates and which lengths depend on the image.

    Args:
        prepared: With islands and sites; changed in place.
        runs: The examples, with the outputs of the float model.
        found: What the float model called.

    Raises:
        TraceError: The prepared model differs from the original.
    """
    with quiet():
        for example, _ in runs:
            run(prepared.model, example)  # traces
    for index, (example, expected) in enumerate(runs):
        with quiet(), _site_hooks(prepared, first=index == 0):
            output = run(prepared.model, example)
        if not same_values(expected, output):
            raise TraceError("The prepared model differs from the original", remedy="report this architecture")
    for module in prepared.model.modules():
        if is_island(module):
            state = island_state(module)
            assert isinstance(state.site_factory, SiteFactory)
            state.site_factory.ready = True
            _report_floats(prepared, module, state, found)
    _report_other_functions(prepared, found)


def _report_floats(prepared: PreparedModel, module: nn.Module, state: IslandState, found: Discovery) -> None:
    """List what tracing left in float, and take away sites that no graph calls (met before a trace failed)."""
    if state.float_reason is not None:
        reason = FloatReason(FloatCause.UNTRACED, without_folders(state.float_reason))
        calls = [c for c in found.functions.get(state.qualname, []) if c.known and not c.convolution]
        for index, call in enumerate(calls):
            kind = "linear" if call.op == "linear" else "matmul"
            prepared.floats.append(FloatSite(f"{state.qualname}::{call.op}_{index}", kind, reason, call.macs))
        if not calls:  # such as torch's attention, a function that contracts several times
            prepared.floats.append(FloatSite(state.qualname, "matmul", reason))
    elif state.refused is not None:
        reason = FloatReason(FloatCause.UNTRACED, f"in some calls: {without_folders(state.refused)}")
        prepared.floats.append(FloatSite(f"{state.qualname}::calls", "matmul", reason))
    for hidden in dict.fromkeys(h for v in state.all_variants() for h in v.hidden):
        name = f"{state.qualname}::{hidden.partition(': ')[0]}"
        reason = FloatReason(FloatCause.UNTRACED, f"{hidden}, inside a call that cannot be traced")
        prepared.floats.append(FloatSite(name, "matmul", reason))
    called = {str(n.target) for v in state.all_variants() for n in v.graph.nodes if n.op == "call_module"}
    factory = state.site_factory
    assert isinstance(factory, SiteFactory)
    for spot in factory.spots(state.qualname):
        if spot.attribute is not None and spot.attribute not in called:
            del module._modules[spot.attribute]
            del factory.known[state.qualname, spot.key]


def _report_other_functions(prepared: PreparedModel, found: Discovery) -> None:
    """List contractions of functions that no site is made of."""
    listed = {f.name.partition("::")[0] for f in prepared.floats if f.reason.cause is FloatCause.UNTRACED}
    for qualname, calls in found.functions.items():
        others = [c for c in calls if not c.known]
        for index, call in enumerate(others):
            kind = "conv" if call.convolution else "matmul"
            if kind == "conv" or qualname not in listed:
                reason = FloatReason(FloatCause.UNSUPPORTED, f"{call.op} has no integer form here")
                prepared.floats.append(FloatSite(f"{qualname}::{call.op}_{index}", kind, reason, call.macs))


@contextmanager
def _site_hooks(prepared: PreparedModel, first: bool) -> Iterator[None]:
    """Context manager that notes the calls of every site; multiply-accumulates and order are of the first example."""

    def called(module: PreparedSite, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        note(module, (*inputs, *(v for v in kwargs.values() if isinstance(v, Tensor))), output)

    def note(module: PreparedSite, inputs: tuple[Any, ...], output: Any) -> None:
        module.note_length(inputs)
        if first:
            module.site.macs += module.macs(inputs, output)
            if module.site.path not in prepared.order:
                prepared.order.append(module.site.path)

    def note_both(module: PreparedAttention, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        names = inspect.signature(module.forward).bind(*inputs, **kwargs).arguments
        query, key, value = (names[name].to("meta") for name in ("query", "key", "value"))
        note(module.qk, (query, key.transpose(-2, -1)), None)  # in float they are one call of torch's
        note(module.av, (query[..., :1].expand(*query.shape[:-1], key.shape[-2]), value), None)

    handles = [m.register_forward_hook(called, with_kwargs=True) for m in prepared.sites()]
    attentions = [m for m in prepared.model.modules() if isinstance(m, PreparedAttention)]
    handles += [m.register_forward_hook(note_both, with_kwargs=True) for m in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def report_unreached(prepared: PreparedModel, found: Discovery) -> None:
    """List linear layers that no example image reached (experts, other branches); they stay float."""
    used = {id(site.own_weight) for site in prepared.sites()}
    for name, module in prepared.model.named_modules():
        if type(module) is nn.Linear and name not in found.calls and id(module.weight) not in used:
            prepared.floats.append(FloatSite(name, "linear", _UNREACHED))
