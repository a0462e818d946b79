"""``F.scaled_dot_product_attention`` as two sites: the products of queries and keys, and of the map and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.sites.base import is_quiet
from harmoq_ao.sites.prepared import PreparedMatmul


class PreparedAttention(nn.Module):
    """``F.scaled_dot_product_attention`` as two products, query-key and attention-value.

    With both in float it is the author's fused call; to be observed, the attention map is computed in addition.

    Args:
        qk: Site of queries and keys.
        av: Site of the attention map and the values.
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
            if not is_quiet() and (self.qk.quantizers() or self.av.quantizers()):
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
