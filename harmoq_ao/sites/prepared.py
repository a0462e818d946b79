"""Prepared sites: the float contraction, with an observer and a fake-quantizer on each operand.

With fake-quantization off every prepared site returns the author's own result, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.quantizer import widen
from harmoq_ao.quant.relative_maps import relative_rows, renormalized
from harmoq_ao.sites.forms import MatmulForm
from harmoq_ao.sites.site import Site

_state = threading.local()


@contextmanager
def quiet() -> Iterator[None]:
    """Within, prepared sites compute their float function and observe nothing (tracing, verification)."""
    before = getattr(_state, "quiet", False)
    _state.quiet = True
    try:
        yield
    finally:
        _state.quiet = before


class PreparedSite(nn.Module):
    """Base of prepared sites.

    Attributes:
        site: What the site is.
        act_quantizer: Fake-quantizer of the activation (of the left operand of a matmul), or None.
        weight_quantizer: Fake-quantizer of the weight (of the right operand), or None.
        joint_scale: `[K]` vector that divides the left operand and multiplies the right one along the contracted axis,
            or None for ones.
        joint_shift: `[K]` vector that is taken from the left operand of a linear before it is divided, and given back
            through the bias, or None for zeros.
    """

    site: Site
    act_quantizer: HarmoqFakeQuantize | None
    weight_quantizer: HarmoqFakeQuantize | None
    joint_scale: nn.Parameter | None
    joint_shift: nn.Parameter | None

    def attach(self, left: HarmoqFakeQuantize | None, right: HarmoqFakeQuantize | None) -> None:
        """Install the fake-quantizers; the site is left in float with none."""
        self.act_quantizer = left
        self.weight_quantizer = right

    def set_joint_scale(self, scale: Tensor | None) -> None:
        """Fix the joint scale `[K]`, or remove it."""
        self.joint_scale = None if scale is None else nn.Parameter(scale.detach().clone().float(), requires_grad=False)

    def set_joint_shift(self, shift: Tensor | None) -> None:
        """Fix the joint shift `[K]`, or remove it."""
        self.joint_shift = None if shift is None else nn.Parameter(shift.detach().clone().float(), requires_grad=False)

    def quantizers(self) -> list[HarmoqFakeQuantize]:
        """The fake-quantizers that are there."""
        return [q for q in (self.act_quantizer, self.weight_quantizer) if q is not None]

    def _init_site(self, site: Site) -> None:
        self.site = site
        self.act_quantizer = None
        self.weight_quantizer = None
        self.register_parameter("joint_scale", None)
        self.register_parameter("joint_shift", None)

    def _observe(self, left: Tensor, right: Tensor | None = None) -> None:
        if getattr(_state, "quiet", False):
            return
        for quantizer, operand in ((self.act_quantizer, left), (self.weight_quantizer, right)):
            if quantizer is None or operand is None or quantizer.observer is None:
                continue
            if bool(quantizer.observer_enabled[0]):
                quantizer.observer(operand.detach())

    def _active(self) -> bool:
        return not getattr(_state, "quiet", False) and any(q.active for q in self.quantizers())

    def _rounded(
        self,
        quantizer: HarmoqFakeQuantize | None,
        operand: Tensor,
        scale: Tensor | None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Operand through its fake-quantizer, in the scaled domain, whether that rounds or not."""
        if quantizer is not None and quantizer.active:
            rounded: Tensor = quantizer(operand, scale, shift)
            return rounded
        centred = operand if shift is None else operand - shift
        return centred if scale is None else centred / scale


class PreparedLinear(nn.Linear, PreparedSite):
    """``F.linear`` with quantized input and weight.

    Also stands for functional calls, where it shares the author's parameter and takes the bias as an argument.
    """

    def __init__(self, site: Site, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias  # type: ignore[assignment]
        self._init_site(site)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        if not self._active():
            self._observe(input)
            return F.linear(input, self.weight, bias)
        x = self._rounded(self.act_quantizer, input, self.joint_scale, self.joint_shift)
        inverse = None if self.joint_scale is None else 1.0 / self.joint_scale
        return F.linear(x, self._rounded(self.weight_quantizer, self.weight, inverse), self._shifted(bias))

    def _shifted(self, bias: Tensor | None) -> Tensor | None:
        """``b + W z``: what the joint shift takes from the input comes back through the bias, unrounded."""
        if self.joint_shift is None:
            return bias
        constant = self.weight @ self.joint_shift.to(self.weight)
        return constant if bias is None else bias + constant


class PreparedConv2d(nn.Conv2d, PreparedSite):
    """``nn.Conv2d`` with quantized input and weight; zero has a code of its own because padding adds zeros."""

    def __init__(self, site: Site, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        kept = (k for k in conv.__dict__ if k not in ("_parameters", "_buffers", "_modules"))
        self.__dict__.update({k: conv.__dict__[k] for k in kept})
        self.weight = conv.weight
        self.bias = conv.bias
        self._init_site(site)

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            self._observe(input)
            return self._conv_forward(input, self.weight, self.bias)
        x = self._rounded(self.act_quantizer, input, None)
        return self._conv_forward(x, self._rounded(self.weight_quantizer, self.weight, None), self.bias)


class PreparedMatmul(PreparedSite):
    """Product of two activations with both operands quantized.

    Args:
        site: The site.
        form: How the author wrote the product.

    Attributes:
        relative: The left operand is an attention map, quantized relative to the largest entry of each row
            (`relative_maps.py`).
    """

    def __init__(self, site: Site, form: MatmulForm) -> None:
        super().__init__()
        self.form = form
        self.relative = False
        self._init_site(site)

    def forward(self, *operands: Tensor, **options: Any) -> Tensor:
        left, right = self.form.canonical(*operands)
        if not self._active():
            self._observe(self._map(left), right)
            return self.form.original(*operands, **options)
        scale = self.joint_scale
        check_length(left, scale, self.site)
        a = self._rounded(self.act_quantizer, self._map(left), scale)
        b = self._rounded(self.weight_quantizer, right, None if scale is None else 1.0 / scale[:, None])
        product = torch.matmul(a, b)
        if self.relative:
            product = renormalized(product, left, widen(a).sum(-1, keepdim=True))
        return self.form.finish(product, *operands, **options)

    def _map(self, left: Tensor) -> Tensor:
        """The left operand as its quantizer takes it."""
        return relative_rows(left) if self.relative else left


def check_length(left: Tensor, joint_scale: Tensor | None, site: Site) -> None:
    """Raise :class:`KernelError` if the contracted length is not that of the joint scale: it depends on the image."""
    if joint_scale is not None and left.shape[-1] != len(joint_scale):
        raise KernelError(
            f"{site.name} contracts over another length than in calibration",
            found=left.shape[-1],
            expected=len(joint_scale),
            remedy="prepare with example_inputs of two image sizes, so that this length is seen to depend on the image",
        )


class PreparedAttention(nn.Module):
    """``F.scaled_dot_product_attention`` as two products, query-key and attention-value.

    With both in float it is the author's fused call. Observing computes the attention map beside it.
    """

    def __init__(self, qk: PreparedMatmul, av: PreparedMatmul) -> None:
        super().__init__()
        self.qk = qk
        self.av = av

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        if self.qk._active() or self.av._active():
            return decomposed_attention(self.qk, self.av, query, key, value, attn_mask, scale)
        with torch.no_grad():
            if not getattr(_state, "quiet", False) and (self.qk.quantizers() or self.av.quantizers()):
                decomposed_attention(self.qk, self.av, query, key, value, attn_mask, scale)
        return F.scaled_dot_product_attention(*arguments, scale=scale)


def decomposed_attention(
    qk: nn.Module,
    av: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """``softmax(q k^T * scale + mask) v`` with the two products done by modules.

    Args:
        query: `[..., M, E]`.
        key: `[..., N, E]`.
        value: `[..., N, V]`.
        attn_mask: Boolean (True takes part) or additive, broadcastable to `[..., M, N]`, or None.
        scale: Factor of the scores; ``1 / sqrt(E)`` by default.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = qk(query, key.transpose(-2, -1)) * factor
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    result: Tensor = av(torch.softmax(scores, dim=-1), value)
    return result
