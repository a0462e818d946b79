"""Which contractions of an island become sites, and the modules that stand there."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from harmoq_ao.common.errors import TraceError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph import Contraction, einsum_form, island_state
from harmoq_ao.graph.contractions import SourceKey
from harmoq_ao.preparation.found import Spot
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
        known: What stands at each contraction, by the island's name and the place in its source.
        counts: How many contractions of an operation an island has had.
    """

    config: HarmoqConfig
    floats: list[FloatSite]
    ready: bool = False
    known: dict[tuple[str, SourceKey], Spot] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def __call__(self, root: nn.Module, contraction: Contraction) -> str | None:
        qualname = island_state(root).qualname
        key = (qualname, contraction.key)
        if key not in self.known:
            self.known[key] = self._create(root, qualname, contraction)
        return self.known[key].attribute

    def spots(self, qualname: str) -> list[Spot]:
        """What stands at the contractions of an island, in the order in which they were met."""
        return [spot for (island, _), spot in self.known.items() if island == qualname]

    def place(self, root: nn.Module, qualname: str, spot: Spot) -> None:
        """Put a site where an earlier preparation found one, its weight, if it has one, yet to be filled in."""
        self.known[qualname, spot.key] = spot
        self.counts[qualname, spot.op] = max(self.counts.get((qualname, spot.op), 0), spot.index + 1)
        if spot.attribute is not None:
            root.add_module(spot.attribute, site_module(root, qualname, spot))

    def _create(self, root: nn.Module, qualname: str, contraction: Contraction) -> Spot:
        index = self.counts.get((qualname, contraction.op), 0)
        self.counts[qualname, contraction.op] = index + 1
        spot = Spot(contraction.key, contraction.op, index, location=without_folders(contraction.location))
        reason = _why_float(contraction)
        if reason is not None:
            if contraction.op != "conv2d":
                name = f"{qualname}::{spot.label}"
                self.floats.append(FloatSite(name, "matmul", reason.at(str(spot.location))))
            return spot
        spot = _described(root, spot, contraction)
        assert spot.attribute is not None
        module = site_module(root, qualname, spot, contraction.computed_weight)
        root.add_module(spot.attribute, module)
        for site in module.modules():
            if isinstance(site, PreparedSite) and self.ready:
                operand = next(a for a in contraction.args if isinstance(a, Tensor))
                site.attach_quantizers(self.config, operand.device)
                logger.warning("%s was met only now, after preparation", site.site.name)
        return spot


def without_folders(text: str) -> str:
    """A text whose paths begin at a package: where packages are installed is nobody's business but this machine's."""
    for folder in sorted({f.rstrip("/") for f in sys.path}, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(f"{folder}/", "")
    return text


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


def _described(root: nn.Module, spot: Spot, contraction: Contraction) -> Spot:
    """The spot with everything that its site is made from."""
    spot = replace(spot, is_site=True)
    if contraction.op == "linear":
        weight = contraction.computed_weight
        shape = tuple((_parameter(root, str(contraction.weight)) if weight is None else weight).shape)
        return replace(spot, shape=shape, weight=None if weight is not None else contraction.weight)
    if contraction.op == "sdpa":
        q, k = contraction.args[:2]
        return replace(spot, shape=(q.shape[-1], k.shape[-2]))
    equation = contraction.args[0] if contraction.op == "einsum" else None
    left, _ = MatmulForm(contraction.op, equation).canonical(*(a for a in contraction.args if isinstance(a, Tensor)))
    role: Role = "attention-value" if contraction.left_is_softmax else "query-key"
    return replace(spot, shape=(left.shape[-1],), role=role, equation=equation)


def site_module(root: nn.Module, qualname: str, spot: Spot, computed: Tensor | None = None) -> nn.Module:
    """The module of a site, without quantizers.

    Args:
        root: The island.
        qualname: Its name.
        spot: Where the site stands, and what it is.
        computed: The weight of a linear that is no parameter; zeros by default, to be filled in.
    """
    name, path = f"{qualname}::{spot.label}", f"{qualname}.{spot.attribute}".lstrip(".")
    if spot.op == "linear":
        site = Site(name, path, "linear", spot.shape, location=spot.location)
        return PreparedLinear(site, _linear_weight(root, spot, computed), None)
    if spot.op == "sdpa":
        query, values = ((length,) for length in spot.shape)
        qk = Site(f"{name}.qk", f"{path}.qk", "matmul", query, "query-key", spot.location)
        av = Site(f"{name}.av", f"{path}.av", "matmul", values, "attention-value", spot.location)
        return PreparedAttention(PreparedMatmul(qk, MatmulForm("matmul")), PreparedMatmul(av, MatmulForm("matmul")))
    site = Site(name, path, "matmul", spot.shape, spot.role, spot.location, unit_length=spot.unit_length)
    return PreparedMatmul(site, MatmulForm(spot.op, spot.equation))


def _linear_weight(root: nn.Module, spot: Spot, computed: Tensor | None) -> nn.Parameter:
    """The author's own parameter, or one that holds what is computed from parameters (a part of ``in_proj_weight``)."""
    if spot.weight is not None:
        return _parameter(root, spot.weight)
    if computed is None:
        computed = next(root.parameters()).new_zeros(spot.shape)
    return nn.Parameter(computed.detach().clone(), requires_grad=False)


def _parameter(root: nn.Module, path: str) -> nn.Parameter:
    owner, _, name = path.rpartition(".")
    parameter = getattr(root.get_submodule(owner), name)
    if not isinstance(parameter, nn.Parameter):
        raise TraceError(
            f"A weight is used in a place that preparation did not meet: {path}",
            found="codes alone, as the model is converted",
            remedy="prepare with example_inputs that reach this place",
        )
    return parameter
