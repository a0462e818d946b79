"""Values brought into shape, as views where strides will do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harmoq_ao.gpu_programs.layout import View, find_strides
from harmoq_ao.programs.indices import Index

SIZE, COLUMNS = 24, 12
Move = Callable[[Tensor], Tensor]

MOVES: dict[str, tuple[bool, Move]] = {
    "as it is": (True, lambda m: m),
    "channels first": (True, lambda m: m.reshape(1, 4, 6, 12).permute(0, 3, 1, 2)),
    "pixel shuffle": (True, lambda m: torch.pixel_shuffle(m.reshape(1, 4, 6, 12).permute(0, 3, 1, 2), 2)),
    "some columns": (True, lambda m: m[:, 4:8].reshape(4, 6, 2, 2).transpose(1, 2)),
    "windows": (True, lambda m: m.reshape(2, 2, 2, 3, 12).transpose(1, 2).reshape(4, 6, 12)),
    "shifted": (False, lambda m: m.reshape(4, 6, 12).roll((1, 2), (0, 1))),
    "flipped": (False, lambda m: m.flip(0)),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_view_is_the_value(name: str) -> None:
    strided, move = MOVES[name]
    places = torch.arange(SIZE * COLUMNS).reshape(SIZE, COLUMNS)
    moved = move(places)
    index = Index((moved // COLUMNS).int(), (moved % COLUMNS).int(), SIZE)
    matrix = torch.randn(SIZE, COLUMNS)
    view = View(index, COLUMNS)
    assert torch.equal(view(matrix), move(matrix))
    assert (view.strides is not None) == strided


def test_pads_are_zeros() -> None:
    rows = torch.tensor([[0, 0], [-1, -1], [1, 1]], dtype=torch.int32)
    index = Index(rows, torch.tensor([[0, 1]] * 3, dtype=torch.int32), 2)
    matrix = torch.randn(2, 2)
    assert torch.equal(View(index, 2)(matrix), torch.stack([matrix[0], torch.zeros(2), matrix[1]]))


def test_nothing_has_no_strides() -> None:
    assert find_strides(torch.zeros(0, 3, dtype=torch.int64)) is None
