"""Small models for tests of calibration, conversion and saving; the expensive steps are done once per session."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.recipes.architectures import ARCHITECTURES, Architecture

#: Bounds from each token instead of calibrated ones.
PER_TOKEN = (SiteRule("*", dynamic=True),)

BY_NAME = {entry.name: entry for entry in ARCHITECTURES}


class Forms(nn.Module):
    """Every way to write a contraction that becomes a site, in a few channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.qkv = nn.Linear(width, 3 * width)
        self.shared = nn.Parameter(torch.randn(width, width) * 0.3)
        self.shared_bias = nn.Parameter(torch.randn(width) * 0.1)
        self.table = nn.Parameter(torch.randn(1, 16, 16) * 0.1)
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        batch, width, height, columns = x.shape
        windows = x.reshape(batch, width, height // 4, 4, columns // 4, 4).permute(0, 2, 4, 3, 5, 1)
        tokens = windows.reshape(-1, 16, width)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        scores = torch.baddbmm(self.table.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=0.5)
        mixed = torch.einsum("bmn,bnc->bmc", scores.softmax(-1), v)
        mixed = mixed + F.scaled_dot_product_attention(q, k, v)
        channels = (q.transpose(1, 2) @ k).softmax(-1)
        mixed = mixed + torch.bmm(v, channels)
        y = F.linear(mixed, self.shared, self.shared_bias * 2) + tokens
        y = y.reshape(batch, height // 4, columns // 4, 4, 4, width).permute(0, 5, 1, 3, 2, 4)
        result: Tensor = self.tail(y.reshape(batch, width, height, columns))
        return result


class LongContraction(nn.Module):
    """Attention among channels: the contraction runs over all pixels, too many products for float32 at 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 6)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.proj(image.flatten(2).transpose(1, 2))
        mixed = (tokens.transpose(1, 2) @ tokens) / tokens.shape[1]
        result: Tensor = (tokens @ mixed)[..., :3].transpose(1, 2).reshape(image.shape)
        return result


class NormalizedChannels(nn.Module):
    """Attention among channels whose queries and keys are normalized over all pixels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 3 * width)
        self.proj = nn.Linear(width, 3)
        self.temperature = nn.Parameter(torch.tensor([[[2.0]], [[3.0]]]))

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.qkv(image.flatten(2).transpose(1, 2))
        q, k, v = tokens.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 4, 1)  # [batch, heads, channels, pixels] each
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixed = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1) @ v
        result: Tensor = self.proj(mixed.flatten(1, 2).transpose(1, 2)).transpose(1, 2).reshape(image.shape)
        return result


class OnlyLinears(nn.Module):
    """Two linears on pixels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one = nn.Linear(3, width)
        self.two = nn.Linear(width, 3, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 2, 3, 1)
        result: Tensor = self.two(torch.tanh(self.one(x))).permute(0, 3, 1, 2)
        return result


def images(count: int, size: tuple[int, int] = (16, 16), seed: int = 101, channels: int = 3) -> list[Tensor]:
    """Random image batches `[1, channels, H, W]`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, channels, *size, generator=generator) for _ in range(count)]


def build(name: str) -> nn.Module:
    """A fresh float model: `forms`, `long`, `channels`, `linears`, or a name of the table of architectures."""
    by_hand: dict[str, Any] = {
        "forms": Forms,
        "long": LongContraction,
        "channels": NormalizedChannels,
        "linears": OnlyLinears,
    }
    if name not in by_hand:
        return entry(name).build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = by_hand[name]()
    return model.eval()


def entry(name: str) -> Architecture:
    """An entry of the table of architectures."""
    return BY_NAME[name]


def prepare(name: str, config: HarmoqConfig) -> h.PreparedModel:
    """A fresh prepared model on two small examples."""
    return h.prepare_harmoq(build(name), config, [images(1)[0], images(1, (16, 24))[0]])


@cache
def _calibrated(name: str, config: HarmoqConfig) -> h.PreparedModel:
    return h.calibrate(prepare(name, config), images(3))


def calibrated(name: str, config: HarmoqConfig) -> h.PreparedModel:
    """A calibrated model to do anything with."""
    return copy.deepcopy(_calibrated(name, config))


@cache
def _converted(name: str, config: HarmoqConfig, float_dtype: torch.dtype) -> h.QuantizedModel:
    return h.convert_harmoq(_calibrated(name, config), float_dtype=float_dtype)


def converted(name: str, config: HarmoqConfig, float_dtype: torch.dtype = torch.float32) -> h.QuantizedModel:
    """A converted model to do anything with."""
    return copy.deepcopy(_converted(name, config, float_dtype))


@torch.no_grad()
def run(model: nn.Module, image: Tensor | None = None) -> Tensor:
    """Output for an image that calibration did not see."""
    result: Tensor = model(images(1, seed=99)[0] if image is None else image)
    return result
