"""Models and comparisons for tests of programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.cpu_kernels import library

Body = Callable[["Written", Tensor], Any]

#: Programs need the C++ kernels.
AVAILABLE = library.status().available


class Written(nn.Module):
    """A forward written in a test, with parameters to use in it."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 3, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(8, 1, 1))
        self.kept: dict[Any, Tensor] = {}

    def forward(self, image: Tensor) -> Any:
        return self.body(self, image)


def written(body: Body) -> Written:
    """A model with the same parameters for every body."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Written(body).eval()


def off_by(got: Tensor, want: Tensor) -> float:
    """Largest difference, in units of the range of what is wanted."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / (want.max() - want.min()))


def where(m: Written, x: Tensor) -> Tensor:
    y = m.head(x)
    return m.tail(torch.where(y > 0, y * 2, y - 1))


def largest(m: Written, x: Tensor) -> Tensor:
    y = m.head(x)
    chosen = m.linear.weight[y.flatten(2).argmax(1)]
    return m.tail(chosen.transpose(1, 2).reshape(y.shape))


def whole_numbers(m: Written, x: Tensor) -> Tensor:
    return m.tail(((m.head(x) * 5).long() + 1).float())


def frequencies(m: Written, x: Tensor) -> Tensor:
    y = m.head(x)
    spectrum = torch.fft.rfft2(y)
    return m.tail(torch.fft.irfft2(spectrum * spectrum.abs(), s=y.shape[-2:]))


def first_of_two(m: Written, x: Tensor) -> Tensor:
    y = m.head(x)
    return m.tail(torch.cat([y.max(1, keepdim=True)[0], y[:, 1:]], 1))


def second_of_two(m: Written, x: Tensor) -> Tensor:
    return m.tail(m.head(x).sort(1)[1].float())


def half_images(m: Written, x: Tensor) -> Tensor:
    """A mean that is neither of a row nor of an image."""
    b, c, h, w = (y := m.head(x)).shape
    parts = y.permute(0, 2, 3, 1).reshape(b * 2, h * w // 2, c)
    parts = parts + parts.mean(1, keepdim=True)
    return m.tail(parts.reshape(b, h, w, c).permute(0, 3, 1, 2))


def channel_attention_of_halves(m: Written, x: Tensor) -> Tensor:
    b, c, h, w = (y := m.head(x)).shape
    tokens = y.permute(0, 2, 3, 1).reshape(b * 2, h * w // 2, 2, 4).permute(0, 2, 3, 1)
    q = F.normalize(tokens, dim=-1)
    mixed = (q @ q.transpose(-2, -1)).softmax(-1) @ tokens
    return m.tail(mixed.permute(0, 3, 1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2))


def narrow(m: Written, x: Tensor) -> Tensor:
    """A convolution of some columns of a matrix."""
    one, two = (F.relu(m.head(x)) + m.table).chunk(2, 1)
    return m.tail(torch.cat([F.conv2d(one, m.tail.weight[:, :4].repeat(2, 1, 1, 1)[:4], padding=1), two * one], 1))


def pads(m: Written, x: Tensor) -> Tensor:
    """What is added to a pad, and what a function without a zero makes of it."""
    y = F.relu(F.pad(m.head(x), (2, 1, 0, 3))) + 1
    return m.tail(torch.sigmoid(F.pad(y, (0, 0, 1, 1))) * F.pad(y, (0, 0, 1, 1)))


def arithmetic(m: Written, x: Tensor) -> Tensor:
    y = m.head(x)
    y = torch.add(y, F.silu(y), alpha=2) - torch.sub(y, 1, alpha=3) / 7 + m.table / (2 + y.sigmoid())
    return m.tail((1 - y) * y.mean() + y.clamp(-1, 1).round())


def gates(m: Written, x: Tensor) -> Tensor:
    """Of each image, and of each pixel."""
    y = m.head(x)
    gate = m.linear(y.mean((2, 3))).sigmoid()
    return m.tail(y * gate[:, :, None, None] * y[:, 2:3] + F.leaky_relu(y, 0.2) * y[:, :1].tanh())


def group_norms(m: Written, x: Tensor) -> Tensor:
    return m.tail(F.group_norm(F.instance_norm(m.head(x)), 2))


def strides(m: Written, x: Tensor) -> Tensor:
    weight = m.head.weight.transpose(0, 1)
    return F.conv_transpose2d(F.conv2d(m.head(x), weight, stride=2, padding=1), weight, stride=2, output_padding=1)


def nothing_but_moved(m: Written, x: Tensor) -> Tensor:
    return x.flip(3)


def in_place(m: Written, x: Tensor) -> Tensor:
    y = m.head(x)
    y += m.table
    y.mul_(2).clamp_(-1, 2)
    return m.tail(F.relu(y, inplace=True)).add_(x)


def flash(m: Written, x: Tensor) -> Tensor:
    tokens = m.head(x).flatten(2).transpose(1, 2)
    q = m.linear(tokens)
    mixed = F.scaled_dot_product_attention(q, tokens, tokens)
    return m.tail((mixed + tokens).transpose(1, 2).reshape(len(x), 8, *x.shape[2:]))


def spelled_norms(m: Written, x: Tensor) -> Tensor:
    """Of channels, by each way to write a variance; and of pixels, which no token-wise norm is."""
    y = m.head(x)
    mean = y.mean(1, keepdim=True)
    y = (y - mean) / ((y - mean).pow(2).mean(1, keepdim=True) + 1e-3).sqrt() * m.table
    tokens = y.flatten(2).transpose(1, 2)
    variance = tokens.var(-1, keepdim=True, unbiased=True)
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / torch.sqrt(variance + 0.1)
    centred = tokens - tokens.mean(-1, keepdim=True)
    tokens = tokens + centred * torch.rsqrt((centred * centred).mean(-1, True) + 1e-2)
    y = tokens.transpose(1, 2).reshape(y.shape)
    return m.tail(y + (y - y.mean(3, True)) / (y.var(3, keepdim=True) + 1.0).sqrt())


def heads_first(m: Written, x: Tensor) -> Tensor:
    """Window attention by einsum, with the heads in front of images and windows and a mask that is filled in."""
    b, c, h, w = (y := m.head(x)).shape
    tokens = y.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 16, c)
    q, k, v = (m.linear(tokens + i).unflatten(-1, (2, 4)).permute(3, 0, 1, 2, 4) for i in range(3))
    scores = torch.einsum("hbwpc,hbwqc->hbwpq", q, k) * 0.5 + m.linear.weight[:2, :1, None, None, None]
    ids = torch.arange(tokens.shape[1] * 16).reshape(-1, 16) % 5 < 2
    scores = scores.masked_fill_((ids[:, :, None] != ids[:, None])[None, None], float("-inf"))
    mixed = torch.einsum("hbwpq,hbwqc->hbwpc", scores.softmax(-1), v)
    mixed = mixed.permute(1, 2, 3, 0, 4).reshape(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4)
    return m.tail(mixed.reshape(b, c, h, w))


#: Forwards that a program can be made of.
BODIES: tuple[Body, ...] = (
    *(where, largest, whole_numbers, frequencies, first_of_two, second_of_two, half_images),
    *(channel_attention_of_halves, narrow, pads, arithmetic, gates, group_norms, strides, nothing_but_moved),
    *(in_place, flash, spelled_norms, heads_first),
)
