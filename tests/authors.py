"""Small models as authors write them: outputs, calls, weights and attention of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tokens(nn.Module):
    """Attention over all pixels; returns the image alone."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj: nn.Module = nn.Linear(width, width)
        self.tail: nn.Module = nn.Conv2d(width, 3, 3, padding=1)

    def parts(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The image, and features."""
        f = self.head(image)
        q, k, v = self.qkv(f.flatten(2).transpose(1, 2)).chunk(3, -1)
        y = self.proj((q @ k.transpose(1, 2) * 0.25).softmax(-1) @ v)
        return self.tail(y.transpose(1, 2).reshape(f.shape)) + image, y

    def forward(self, image: Tensor) -> Any:
        return self.parts(image)[0]


class TupleOutput(Tokens):
    def forward(self, image: Tensor) -> Any:
        return self.parts(image)


class DictOutput(Tokens):
    def forward(self, image: Tensor) -> Any:
        small, features = self.parts(image)
        return {"small": small, "large": F.interpolate(small, scale_factor=2), "features": features, "note": "x"}


@dataclass
class Output:
    """As transformers' outputs: attributes, some of them None."""

    features: Tensor
    reconstruction: Tensor
    loss: Tensor | None = None


class ObjectOutput(Tokens):
    def forward(self, image: Tensor) -> Any:
        small, features = self.parts(image)
        return Output(features, small)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class TwoImages(Tokens):
    """Which of both is meant cannot be told."""

    def forward(self, image: Tensor) -> Any:
        small, _ = self.parts(image)
        return Pair(small, small * 0.5)


class KeywordOnly(Tokens):
    def forward(self, *, lr: Tensor, factor: float | None = None) -> Any:  # type: ignore[override]
        return self.parts(lr)[0] * (factor or 1.0)


class Tied(Tokens):
    """One weight in two linears, and in a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)
        self.other.weight = self.proj.weight  # type: ignore[assignment]
        self.again = self.proj

    def forward(self, image: Tensor) -> Any:
        small, y = self.parts(image)
        y = F.linear(self.again(self.other(input=y)), self.proj.weight)  # type: ignore[arg-type]
        return small + y[..., :3].transpose(1, 2).reshape(image.shape)


class Normalised(Tokens):
    """Weight normalisation, as torch has it now and as it had it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.tail = torch.nn.utils.weight_norm(self.tail)


class Adapted(nn.Module):
    """A linear with a low-rank adapter that asks for the type of its weight, as LoRA's do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(16, 4, bias=False)
        self.up = nn.Linear(4, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x.to(self.down.weight.dtype)))
        return result


class Lora(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.proj = Adapted(nn.Linear(16, 16))


class LocalImports(nn.Module):
    """einops, torch and math are imported within forward."""

    def __init__(self, own_einsum: bool = True) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.qkv = nn.Linear(16, 48)
        self.tail = nn.Conv2d(16, 3, 3, padding=1)
        self.own_einsum = own_einsum

    def forward(self, image: Tensor) -> Tensor:
        import math

        import torch.nn.functional as functional
        from einops import einsum, rearrange

        f = self.head(image)
        height, width = f.shape[-2:]
        qkv = self.qkv(rearrange(f, "b c h w -> b (h w) c"))
        q, k, v = rearrange(qkv, "b n (k heads d) -> k b heads n d", k=3, heads=2)
        if self.own_einsum:
            scores = einsum(q, k, "b heads i d, b heads j d -> b heads i j") / math.sqrt(q.shape[-1])
            y = einsum(functional.softmax(scores, -1), v, "b heads i j, b heads j d -> b heads i d")
        else:
            y = functional.scaled_dot_product_attention(q, k, v)
        y = rearrange(y, "b heads (h w) d -> b (heads d) h w", h=height, w=width)
        result: Tensor = self.tail(y) + image
        return result


class TorchAttention(nn.Module):
    """torch's own attention modules, whose fused path is taken in evaluation.

    Args:
        kind: ``weights`` and ``no weights`` (what is asked of ``nn.MultiheadAttention``), ``encoder``, ``norm first``,
            ``gelu``, ``padded`` or ``decoder``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 3, 3, padding=1)
        options: dict[str, Any] = {"norm first": {"norm_first": True}, "gelu": {"activation": "gelu"}}.get(kind, {})
        if "weights" in kind:
            self.attention: nn.Module = nn.MultiheadAttention(16, 2, batch_first=True)
        elif kind == "decoder":
            layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
            self.attention = nn.TransformerDecoder(layer, 1)
        else:
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
            self.attention = nn.TransformerEncoder(layer, 2, enable_nested_tensor=kind != "norm first")

    def forward(self, image: Tensor) -> Tensor:
        f = self.head(image)
        t = f.flatten(2).transpose(1, 2)
        if "weights" in self.kind:
            y, weights = self.attention(t, t, t, need_weights=self.kind == "weights")
            y = y if weights is None else y * (1 + weights.mean())
        elif self.kind == "padded":
            mask = torch.zeros(t.shape[:2], dtype=torch.bool, device=t.device)
            mask[:, -3:] = True
            y = self.attention(t, src_key_padding_mask=mask)
        else:
            y = self.attention(t, t) if self.kind == "decoder" else self.attention(t)
        result: Tensor = self.tail(y.transpose(1, 2).reshape(f.shape)) + image
        return result


class Unsupported(Tokens):
    """Contractions that no site is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(16, 16, 1)
        self.up = nn.ConvTranspose2d(3, 3, 2, 2)

    def forward(self, image: Tensor) -> Any:
        small, y = self.parts(image)
        y = torch.tensordot(self.one(y.transpose(1, 2)).transpose(1, 2), self.qkv.weight[:16], dims=([2], [1]))
        return self.up(small + y[..., :3].transpose(1, 2).reshape(image.shape))


class Trainable(Tokens):
    """Normalises by statistics and drops values in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: Tensor) -> Any:
        return self.drop(self.norm(self.parts(image)[0]))
