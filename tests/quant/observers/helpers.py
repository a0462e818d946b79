"""Observers that have seen streams of batches."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.quant.observers import OBSERVERS, OperandObserver
from harmoq_ao.quant.quantizer import QuantizerSpec
from tests.strategies import float_tensors

NAMES = sorted(OBSERVERS)


def observed(name: str, batches: list[Tensor], spec: QuantizerSpec | None = None, **options: Any) -> OperandObserver:
    observer = OBSERVERS[name](spec or QuantizerSpec(4), **options)
    for batch in batches:
        assert observer(batch) is batch
    return observer


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    """Batches of one operand, and its contracted axis of constant length."""
    channels, axis = draw(st.integers(1, 12)), draw(st.integers(0, 2))
    result = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(float_tensors((draw(st.integers(1, 5)), draw(st.integers(1, 9)), channels)))
        result.append(rows.movedim(-1, axis))
    return result, axis
