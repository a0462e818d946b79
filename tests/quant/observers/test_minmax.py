"""Extremes: nothing observed is clipped, under any scale."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.quant.quantizer import QuantizerSpec, snap_bounds
from tests.quant.observers.helpers import batches, observed
from tests.strategies import joint_scales, static_specs


@given(stream=batches(), spec=static_specs(), data=st.data())
def test_min_max_bounds_are_those_of_the_scaled_operand(
    stream: tuple[list[Tensor], int], spec: QuantizerSpec, data: st.DataObject
) -> None:
    tensors, axis = stream
    scale = data.draw(joint_scales(tensors[0].shape[axis]))
    observer = observed("minmax", tensors, spec, contracted_axis=axis, reservoir_rows=2)
    values = torch.cat([(t.movedim(axis, -1) / scale).flatten() for t in tensors])
    assert observer.bounds(scale) == snap_bounds(values.min(), values.max(), spec)
