"""Ranks as processes of their own, on one thread each, that meet in a file."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join(number: int, count: int, folder: Path, timeout: float = 60.0) -> None:
    """Become one of `count` ranks."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=timedelta(seconds=timeout))


def run(target: Callable[..., None], count: int, *arguments: object, timeout: float = 120.0) -> list[int | None]:
    """Exit codes of ranks that call ``target(number, count, *arguments)``, all started from one process.

    That process imports torch once, and has neither threads nor a state of its own to hand down.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([target.__module__])
    processes = [context.Process(target=target, args=(number, count, *arguments)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        process.kill()
    return [process.exitcode for process in processes]


class Tiny(nn.Module):
    """Attention in windows of a small picture, in eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        result: Tensor = self.tail(tokens.transpose(1, 2).reshape(x.shape))
        return result


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + (q @ k.transpose(1, 2) * 0.3).softmax(-1) @ v
        result: Tensor = x + self.mlp(x)
        return result


def tiny() -> nn.Module:
    """The same model whenever it is asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny().eval()
