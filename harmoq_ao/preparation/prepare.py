"""``prepare_harmoq``: a float model becomes one whose contractions are sites, observed and fake-quantized."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from spandrel import ImageModelDescriptor
from torch import Tensor, nn

from harmoq_ao.common.errors import InputError, SavedModelError, TraceError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph import (
    Contraction,
    Discovery,
    IslandState,
    einsum_form,
    is_island,
    island_state,
    make_island,
    same_values,
)
from harmoq_ao.graph.contractions import SourceKey, contraction_macs
from harmoq_ao.preparation.first_runs import Run, first_runs, run
from harmoq_ao.sites.forms import MatmulForm
from harmoq_ao.sites.model import ModelTraits, PreparedModel, attach_quantizers
from harmoq_ao.sites.prepared import (
    PreparedAttention,
    PreparedConv2d,
    PreparedLinear,
    PreparedMatmul,
    PreparedSite,
    quiet,
)
from harmoq_ao.sites.site import FloatSite, Role, Site
from harmoq_ao.zoo import LoadedModel, architecture_spec

logger = logging.getLogger(__name__)

_MATMULS = ("matmul", "bmm", "mm", "baddbmm", "einsum")


def prepare_harmoq(
    model: nn.Module | LoadedModel | ImageModelDescriptor[Any],
    config: HarmoqConfig | None = None,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    strict: bool = False,
) -> PreparedModel:
    """Put a site at every linear layer and every product of activations.

    The given model is copied, not changed. With fake-quantization off (as it comes) the result equals it bit for bit,
    at every image size.

    Args:
        model: Float model in evaluation mode semantics (``eval()`` is called on the copy), a
            :class:`LoadedModel`, or a spandrel descriptor.
        config: What to quantize; the default is W8A8 in the ``deploy`` profile.
        example_inputs: One image batch `[B, C, H, W]`, or several of different sizes; random images by default. Two
            sizes tell which lengths depend on the image.
        strict: Raise where a module cannot be traced, instead of leaving it float.

    Raises:
        ConfigError: A rule matches no site.
        TraceError: A module cannot be traced (``strict``), or the result would differ from the original.
        InputError: The examples are not images, or the model does not take them.
    """
    config = config or HarmoqConfig()
    copied = _float_copy(model)
    with torch.no_grad():
        first = first_runs(copied, example_inputs)
        prepared = PreparedModel(copied, config, _traits(model, copied, *first.runs[0]))
        prepared.example_shapes = [tuple(example.shape) for example, _ in first.runs]
        _make_islands(prepared, first.found, strict)
        _swap_modules(prepared, first.found, first.fixed)
        _measure(prepared, first.runs)
        _report_unreached(prepared, first.found)
    names = [(m.site.name, m.site.kind) for m in prepared.sites()]
    config.check_rules(names + [(f.name, f.kind) for f in prepared.floats])
    for module in prepared.sites():
        attach_quantizers(module, config, first.runs[0].example.device)
    return prepared


# --- the model and its examples ---------------------------------------------------------------------------------------


def _float_copy(model: Any) -> nn.Module:
    inner = getattr(model, "model", None)
    if not isinstance(model, nn.Module) and isinstance(inner, nn.Module):
        model = inner  # a spandrel descriptor
    if not isinstance(model, nn.Module):
        raise InputError("prepare_harmoq takes a torch model", found=type(model).__name__, expected="torch.nn.Module")
    if any(isinstance(m, PreparedSite) or is_island(m) for m in model.modules()):
        raise InputError("This model is prepared already", remedy="prepare the float model it was made from")
    return copy.deepcopy(model).eval()


def _traits(given: Any, model: nn.Module, example: Tensor, output: Any) -> ModelTraits:
    """Traits of a loaded model as they come; of a bare module, what its output and its class tell."""
    output = output[0] if isinstance(output, (tuple, list)) else output
    try:
        architecture = architecture_spec(model)
    except SavedModelError:
        architecture = None
    scale = getattr(given, "scale", None)
    return ModelTraits(
        scale if isinstance(scale, int) else max(1, round(output.shape[-1] / example.shape[-1])),
        getattr(given, "size_multiple", 1) if not isinstance(given, nn.Module) else 1,
        getattr(given, "size_minimum", 0) if not isinstance(given, nn.Module) else 0,
        architecture,
    )


# --- sites ------------------------------------------------------------------------------------------------------------


@dataclass
class SiteFactory:
    """Makes the site of each contraction met while tracing; the same place in the source is the same site.

    Args:
        config: For sites that are met only after preparation (another branch, at another image size).
        floats: Contractions left alone, with the reason.
        ready: Preparation is over; new sites get their quantizers at once.
    """

    config: HarmoqConfig
    floats: list[FloatSite]
    ready: bool = False
    known: dict[tuple[str, SourceKey], str | None] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def __call__(self, root: nn.Module, contraction: Contraction) -> str | None:
        qualname = island_state(root).qualname
        key = (qualname, contraction.key)
        if key not in self.known:
            self.known[key] = self._create(root, qualname, contraction)
        return self.known[key]

    def _create(self, root: nn.Module, qualname: str, contraction: Contraction) -> str | None:
        index = self.counts.get((qualname, contraction.op), 0)
        self.counts[qualname, contraction.op] = index + 1
        label = f"{contraction.op}_{index}"
        reason = _unfit(contraction)
        if reason is not None:
            if contraction.op != "conv2d":
                self.floats.append(FloatSite(f"{qualname}::{label}", "matmul", f"{reason} ({contraction.location})"))
            return None
        attribute = f"harmoq_{label}"
        module = _site_module(root, qualname, label, contraction)
        root.add_module(attribute, module)
        for site in module.modules():
            if isinstance(site, PreparedSite) and self.ready:
                operand = next(a for a in contraction.args if isinstance(a, Tensor))
                attach_quantizers(site, self.config, operand.device)
                logger.warning("%s was met only now, after preparation", site.site.name)
        return attribute


def _unfit(contraction: Contraction) -> str | None:
    """Why a contraction cannot be a site, or None."""
    if contraction.op == "conv2d":
        return "a functional convolution"
    if not contraction.depends_on_input:
        return "does not depend on the image; folded to a constant at convert"
    tensors = [a for a in contraction.args if isinstance(a, Tensor)]
    if any(not t.is_floating_point() for t in tensors):
        return "an operand is not floating point"
    if contraction.op == "linear":
        known = contraction.weight is not None or contraction.computed_weight is not None
        return None if known else "its weight depends on the image"
    if any(t.dim() < 2 for t in tensors[-2:]):
        return "an operand is a vector"
    if contraction.op == "einsum" and (len(tensors) != 2 or einsum_form(contraction.args[0]) is None):
        return f"einsum {contraction.args[0]!r} is no batched product of two matrices"
    if contraction.op == "sdpa":
        unusual = [k for k in ("is_causal", "enable_gqa") if contraction.kwargs.get(k)]
        unusual += ["is_causal"] if len(contraction.args) > 5 and contraction.args[5] else []
        return f"scaled_dot_product_attention with {', '.join(unusual)}" if unusual else None
    return None


def _linear_weight(root: nn.Module, contraction: Contraction) -> nn.Parameter:
    """The author's own parameter, or one that holds what is computed from parameters (a part of ``in_proj_weight``)."""
    if contraction.computed_weight is not None:
        return nn.Parameter(contraction.computed_weight.detach().clone(), requires_grad=False)
    owner, _, name = str(contraction.weight).rpartition(".")
    parameter: nn.Parameter = getattr(root.get_submodule(owner), name)
    return parameter


def _site_module(root: nn.Module, qualname: str, label: str, contraction: Contraction) -> nn.Module:
    name, path = f"{qualname}::{label}", f"{qualname}.harmoq_{label}".lstrip(".")
    if contraction.op == "linear":
        weight = _linear_weight(root, contraction)
        site = Site(name, path, "linear", tuple(weight.shape), location=contraction.location)
        return PreparedLinear(site, weight, None)
    if contraction.op == "sdpa":
        q, k = contraction.args[:2]
        qk = Site(f"{name}.qk", f"{path}.qk", "matmul", (q.shape[-1],), "query-key", contraction.location)
        av = Site(f"{name}.av", f"{path}.av", "matmul", (k.shape[-2],), "attention-value", contraction.location)
        return PreparedAttention(PreparedMatmul(qk, MatmulForm("matmul")), PreparedMatmul(av, MatmulForm("matmul")))
    form = MatmulForm(contraction.op, contraction.args[0] if contraction.op == "einsum" else None)
    role: Role = "attention-value" if contraction.left_is_softmax else "query-key"
    left, _ = form.canonical(*(a for a in contraction.args if isinstance(a, Tensor)))
    return PreparedMatmul(Site(name, path, "matmul", (left.shape[-1],), role, contraction.location), form)


def _make_islands(prepared: PreparedModel, found: Discovery, strict: bool) -> None:
    factory = SiteFactory(prepared.config, prepared.floats)
    for qualname in found.islands:
        module = prepared.model.get_submodule(qualname)
        make_island(module, IslandState(qualname, factory, quiet=quiet, strict=strict))


def _swap_modules(prepared: PreparedModel, found: Discovery, fixed: set[str]) -> None:
    swaps: dict[nn.Module, nn.Module] = {}
    for name in found.calls:
        module = prepared.model.get_submodule(name)
        site: PreparedSite | None = None
        if type(module) is nn.Linear:
            site = _linear_site(prepared, name, module, name in fixed)
        elif isinstance(module, nn.Conv2d):
            site = _conv_site(prepared, name, module, found.macs.get(name, 0))
        if site is not None:
            swaps[module] = site
    replace_modules(prepared.model, swaps)


def _report_unreached(prepared: PreparedModel, found: Discovery) -> None:
    """List linear layers that no example image reached (experts, other branches); they stay float."""
    used = {id(m.weight) for m in prepared.model.modules() if isinstance(m, PreparedLinear)}
    for name, module in prepared.model.named_modules():
        if type(module) is nn.Linear and name not in found.calls and id(module.weight) not in used:
            prepared.floats.append(FloatSite(name, "linear", "no example image reached it"))


def _linear_site(prepared: PreparedModel, name: str, linear: nn.Linear, fixed: bool) -> PreparedLinear | None:
    """The site of a linear layer; None, and a line in the report, where its input does not depend on the image."""
    if fixed:
        reason = "does not depend on the image; folded to a constant at convert"
        prepared.floats.append(FloatSite(name, "linear", reason))
        return None
    return PreparedLinear(Site(name, name, "linear", tuple(linear.weight.shape)), linear.weight, linear.bias)


def _conv_site(prepared: PreparedModel, name: str, conv: nn.Conv2d, macs: int) -> PreparedConv2d | None:
    """The site of a convolution; None, and a line in the report, where it stays float."""
    reason = prepared.config.settings(name, "conv2d").reason
    if reason is None and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
        reason = f"padding {conv.padding_mode!r} / {conv.padding!r} has no integer form"
    if reason is not None:
        prepared.floats.append(FloatSite(name, "conv2d", reason, macs))
        return None
    return PreparedConv2d(Site(name, name, "conv2d", tuple(conv.weight.shape)), conv)


def replace_modules(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones are registered (modules may be shared).

    Args:
        model: Changed in place.
        swaps: New modules by old ones.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swaps:
                parent._modules[name] = swaps[child]


def _measure(prepared: PreparedModel, runs: list[Run]) -> None:
    """Trace every island; learn execution order, multiply-accumulates and which lengths depend on the image.

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
            _report_floats(prepared, module, state)


def _report_floats(prepared: PreparedModel, module: nn.Module, state: IslandState) -> None:
    """List what tracing left in float, and take away sites that no graph calls (met before a trace failed)."""
    if state.float_reason is not None:
        prepared.floats.append(FloatSite(state.qualname, "module", state.float_reason))
    for hidden in dict.fromkeys(h for v in state.all_variants() for h in v.hidden):
        name = f"{state.qualname}::{hidden.partition(': ')[0]}"
        prepared.floats.append(FloatSite(name, "matmul", f"{hidden}, inside a call that cannot be traced"))
    called = {str(n.target) for v in state.all_variants() for n in v.graph.nodes if n.op == "call_module"}
    factory = state.site_factory
    assert isinstance(factory, SiteFactory)
    for key, attribute in list(factory.known.items()):
        if key[0] == state.qualname and attribute is not None and attribute not in called:
            del module._modules[attribute]
            del factory.known[key]


@contextmanager
def _site_hooks(prepared: PreparedModel, first: bool) -> Iterator[None]:
    def note(module: PreparedSite, inputs: tuple[Any, ...], output: Tensor) -> None:
        site = module.site
        if isinstance(module, PreparedMatmul):
            left, right = module.form.canonical(*inputs)
            if site.shape != (left.shape[-1],):
                site.shape = (0,)
            macs = left.numel() * right.shape[-1] * max(1, right[..., 0, 0].numel() // max(1, left[..., 0, 0].numel()))
        else:
            macs = contraction_macs("conv2d" if site.kind == "conv2d" else "linear", (inputs[0], module.weight), output)
        if first:
            site.macs += macs
            if site.path not in prepared.order:
                prepared.order.append(site.path)

    handles = [m.register_forward_hook(note) for m in prepared.sites()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
