"""Masks of windows: region ids where scores between regions are what is masked, else tables that windows share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXCLUDED = -1e4
"""Added to a score, leaves nothing of it: authors write minus infinity, or a number like it, in its place."""


@dataclass(frozen=True)
class Mask:
    """What is added to the scores of each window.

    Attributes:
        regions: `[windows, N]` int32: scores between tokens of different regions get `value`; or None.
        value: See there.
        tables: `[kinds, N, M]` float32 where it is no matter of regions; or None.
        kinds: `[windows]` int32, which table; -1 for none.
    """

    regions: Tensor | None
    value: float
    tables: Tensor | None
    kinds: Tensor | None

    @staticmethod
    def of(table: Tensor) -> Mask | None:
        """A mask `[windows, N, M]`; None where it is all zeros."""
        value = float(table.min())
        if value == 0 and float(table.max()) == 0:
            return None
        if table.shape[1] == table.shape[2]:
            regions = (table == 0).to(torch.uint8).argmax(2).to(torch.int32)
            apart = regions[:, :, None] != regions[:, None, :]
            if torch.equal(table, torch.where(apart, value, 0.0)):
                return Mask(regions.contiguous(), value, None, None)
        kinds: dict[bytes, int] = {}
        numbers: list[int] = []
        kept: list[Tensor] = []
        for own in table:
            key = own.contiguous().numpy().tobytes()
            if not own.any():
                numbers.append(-1)
                continue
            if key not in kinds:
                kinds[key] = len(kept)
                kept.append(own)
            numbers.append(kinds[key])
        return Mask(None, value, torch.stack(kept).contiguous(), torch.tensor(numbers, dtype=torch.int32))
