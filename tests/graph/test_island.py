"""Random forwards, random sizes: an island equals its author's module bit for bit, or refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harmoq_ao.graph import island_state, same_values
from tests.graph.test_tracer import island

CHANNELS = 4


def window(x: Tensor, size: int) -> Tensor:
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
    return x.view(b, x.shape[1] // size, size, x.shape[2] // size, size, c).transpose(2, 3).reshape(-1, size * size, c)


def unwindow(x: Tensor, size: int, h: int, w: int) -> Tensor:
    rows, columns = math.ceil(h / size), math.ceil(w / size)
    b = int(x.shape[0] / rows / columns)
    x = x.view(b, rows, columns, size, size, -1).transpose(2, 3)
    return x.reshape(b, rows * size, columns * size, -1)[:, :h, :w]


def windowed_attention(self: Composed, x: Tensor) -> Tensor:
    q, k, v = self.qkv(window(x, 3)).chunk(3, -1)
    return unwindow((q @ k.transpose(1, 2)).softmax(-1) @ v, 3, x.shape[1], x.shape[2])


def channel_attention(self: Composed, x: Tensor) -> Tensor:
    t = rearrange(x, "b h w c -> b c (h w)")
    t = torch.einsum("bcn,bdn->bcd", F.normalize(t, dim=-1), t).softmax(-1) @ t
    return rearrange(t, "b c (h w) -> b h w c", h=x.shape[1])


def branch_on_shape(self: Composed, x: Tensor) -> Tensor:
    return x.roll(1, 1) if x.shape[1] > x.shape[2] else x * 1.5


def branch_on_remainder(self: Composed, x: Tensor) -> Tensor:
    if x.size(1) % 2 or x.size(2) % 2:
        x = F.pad(x, (0, 0, 0, 1, 0, 1))[:, : x.shape[1], : x.shape[2]] + 1
    return x


def branch_on_data(self: Composed, x: Tensor) -> Tensor:
    return x.tanh() if x.mean() > 0 else x


def loop(self: Composed, x: Tensor) -> Tensor:
    rows = [self.proj(r) for r in x.split(4, dim=1)]
    return torch.cat(rows, 1)


def mask_from_size(self: Composed, x: Tensor) -> Tensor:
    mask = torch.zeros((1, x.shape[1], x.shape[2], 1), device=x.device)
    mask[:, x.shape[1] // 2 :, 1:] = 0.5
    mask += torch.arange(x.shape[2])[:, None] / max(x.shape[1], 2)
    return x + mask.to(x.dtype)


def in_place(self: Composed, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, ::2] += 1
    y.mul_(0.5)
    y -= x.mean((1, 2), keepdim=True)
    return y


def write_argument(self: Composed, x: Tensor) -> Tensor:
    x += 0.25
    return x


def number_play(self: Composed, x: Tensor) -> Tensor:
    b, h, w, _ = x.shape
    return x * (math.sqrt(h * w) / len(x)) + int(h * w / b) % 3 + round(h / 3) + min(h, w) ** 0.5


def opaque_table(self: Composed, x: Tensor) -> Tensor:
    return x * _looked_up(x.shape[1])


def _looked_up(h: int) -> float:
    return {n: 1 / (1 + n) for n in range(40)}[h]


def store(self: Composed, x: Tensor) -> Tensor:
    self.last = (x.shape[1], x.shape[2])
    return x.reshape(x.shape[0], self.last[0] * self.last[1], -1).view_as(x)


def parameter_bias(self: Composed, x: Tensor) -> Tensor:
    table = self.table[self.index.view(-1)].view(2, 2, -1).permute(2, 0, 1).sum(0)
    return x + 16 * torch.sigmoid(table)[x.shape[1] % 2, x.shape[2] % 2]


STEPS: tuple[Callable[[Composed, Tensor], Tensor], ...] = (
    windowed_attention,
    channel_attention,
    branch_on_shape,
    branch_on_remainder,
    branch_on_data,
    loop,
    mask_from_size,
    in_place,
    write_argument,
    number_play,
    opaque_table,
    store,
    parameter_bias,
)


class Composed(nn.Module):
    """A forward made of some steps."""

    index: Tensor

    def __init__(self, steps: tuple[Callable[[Composed, Tensor], Tensor], ...]) -> None:
        super().__init__()
        self.steps = steps
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.proj = nn.Linear(CHANNELS, CHANNELS)
        self.table = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("index", torch.tensor([[0, 1], [2, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self, x)
        return x


@settings(max_examples=60)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=5),
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(2, 11), st.integers(2, 11)), min_size=2, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_traced_equals_original(
    steps: list[Callable[[Composed, Tensor], Tensor]], sizes: list[tuple[int, int, int]], seed: int
) -> None:
    torch.manual_seed(seed)
    module = Composed(tuple(steps)).eval()
    twin, _ = island(module)
    with torch.no_grad():
        for b, h, w in sizes + sizes:
            x = torch.randn(b, h, w, CHANNELS)
            theirs, mine = x.clone(), x.clone()
            assert same_values(module(theirs), twin(mine))
            assert torch.equal(theirs, mine)
    assert island_state(twin).float_reason is None
    contracts = sum(2 for s in steps if s in (windowed_attention, channel_attention))
    assert all(v.contractions == contracts for v in island_state(twin).all_variants())
