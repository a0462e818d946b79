"""Attention among channels, whose scores are sums over all pixels of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harmoq_ao.programs.attention_matching import Match
from harmoq_ao.programs.steps import Value

if TYPE_CHECKING:
    from harmoq_ao.programs.lower import Lowering


def lower(lowering: Lowering, match: Match) -> Value | None:
    return None
