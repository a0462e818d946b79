"""Models to prepare."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from harmoq_ao import HarmoqConfig, prepare_harmoq
from harmoq_ao.sites.model import PreparedModel
from tests.models import entry

SWINIR = entry("SwinIR/light")


def prepare(config: HarmoqConfig | None = None, **options: Any) -> PreparedModel:
    options.setdefault("example_inputs", SWINIR.example())
    return prepare_harmoq(SWINIR.build(), config, **options)


class Small(nn.Module):
    """Attention whose forward can be made untraceable, with an expert that small images never reach."""

    def __init__(self, traceable: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.qkv = nn.Linear(8, 24)
        self.expert = nn.Linear(8, 8)
        self.traceable = traceable
        self.table = dict.fromkeys(range(100), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        if not self.traceable:
            y = y * self.table[y.shape[1]]
        return self.expert(y) if y.shape[1] > 200 else y
