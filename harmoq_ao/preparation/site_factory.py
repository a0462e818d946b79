"""Which contractions of an island become sites, and the modules that stand there."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor, nn

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph import Contraction, einsum_form, island_state
from harmoq_ao.graph.contractions import SourceKey
from harmoq_ao.sites.attention import PreparedAttention
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.forms import MatmulForm
from harmoq_ao.sites.prepared import PreparedLinear, PreparedMatmul
from harmoq_ao.sites.site import CONSTANT, FloatCause, FloatReason, FloatSite, Role, Site

logger = logging.getLogger(__name__)


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
        reason = _why_float(contraction)
        if reason is not None:
            if contraction.op != "conv2d":
                self.floats.append(FloatSite(f"{qualname}::{label}", "matmul", reason.at(contraction.location)))
            return None
        attribute = f"harmoq_{label}"
        module = _site_module(root, qualname, label, contraction)
        root.add_module(attribute, module)
        for site in module.modules():
            if isinstance(site, PreparedSite) and self.ready:
                operand = next(a for a in contraction.args if isinstance(a, Tensor))
                site.attach_quantizers(self.config, operand.device)
                logger.warning("%s was met only now, after preparation", site.site.name)
        return attribute


def _why_float(contraction: Contraction) -> FloatReason | None:
    """Why a contraction cannot be a site, or None."""
    if not contraction.depends_on_input and contraction.op != "conv2d":
        return CONSTANT
    text = _unsupported(contraction)
    return None if text is None else FloatReason(FloatCause.UNSUPPORTED, text)


def _unsupported(contraction: Contraction) -> str | None:
    """What a contraction has that no site takes, or None."""
    if contraction.op == "conv2d":
        return "a functional convolution"
    tensors = [a for a in contraction.args if isinstance(a, Tensor)]
    if any(not t.is_floating_point() for t in tensors):
        return "an operand is not floating point"
    if contraction.op == "linear":
        known = contraction.weight is not None or contraction.computed_weight is not None
        return None if known else "its weight depends on the image"
    if any(t.dim() < 2 for t in tensors[-2:]):
        return "an operand is a vector"
    if contraction.op == "einsum" and (len(tensors) != 2 or einsum_form(contraction.args[0]) is None):
        return f"einsum {contraction.args[0]!r} is not a batched product of two matrices"
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
