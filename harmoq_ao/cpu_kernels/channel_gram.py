from __future__ import annotations
import torch
from torch import Tensor


def channel_gram(q: Tensor, q_col: int, k: Tensor, k_col: int, heads: int, width: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    a = q[:, q_col : q_col + heads * width].float().reshape(images, -1, heads, width).permute(0, 2, 3, 1)
    b = k[:, k_col : k_col + heads * width].float().reshape(images, -1, heads, width).permute(0, 2, 3, 1)
    return a @ b.transpose(-2, -1), a.square().sum(-1), b.square().sum(-1)


def channel_gram_codes(q: Tensor, q_col: int, k: Tensor, k_col: int, heads: int, width: int, images: int, qr: Tensor, qo: Tensor, qb: int, kr: Tensor, ko: Tensor, kb: int) -> tuple[Tensor, Tensor, Tensor]:
    a = q[:, q_col : q_col + heads * width].float().reshape(images, -1, heads, width).permute(0, 2, 3, 1)
    b = k[:, k_col : k_col + heads * width].float().reshape(images, -1, heads, width).permute(0, 2, 3, 1)
    a = (a * qr[..., None] + qo[..., None]).round().clamp(0, 2**qb - 1).double()
    b = (b * kr[..., None] + ko[..., None]).round().clamp(0, 2**kb - 1).double()
    return (a @ b.transpose(-2, -1)).long(), a.sum(-1).long(), b.sum(-1).long()
