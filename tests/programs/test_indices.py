"""Movements followed as indices against the same operators of torch on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.cpu_kernels.rowwise import Broadcast
from harmoq_ao.programs.heads import find_heads, result_index
from harmoq_ao.programs.indices import Aligned, Index, Roots
from harmoq_ao.programs.materialize import Gather, to_matrix

aten = torch.ops.aten
MANY = settings(max_examples=80, deadline=None)
Draw = st.DrawFn


def matrix_of(index: Index, columns: int) -> Tensor:
    """A matrix without equal entries, and none that is zero as pads are."""
    return torch.arange(1.0, 1 + index.length * columns).reshape(index.length, columns)


def gathered(index: Index, matrix: Tensor) -> Tensor:
    """Entries by the definition of an index: zero where a row is a pad."""
    rows, columns = index.rows.long(), index.columns.long()
    return torch.where(rows < 0, 0.0, matrix[rows.clamp_min(0), columns])


def axis(draw: Draw, x: Tensor) -> int:
    return draw(st.integers(-x.dim(), x.dim() - 1))


def permute(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    return aten.permute.default, draw(st.permutations(range(x.dim())))


def transpose(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    return aten.transpose.int, axis(draw, x), axis(draw, x)


def reshape(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    """One axis in two, or two in one."""
    shape, at = list(x.shape), axis(draw, x) % x.dim()
    if draw(st.booleans()) and at + 1 < x.dim():
        shape[at : at + 2] = [shape[at] * shape[at + 1]]
    else:
        factor = draw(st.sampled_from([n for n in range(1, shape[at] + 1) if shape[at] % n == 0]))
        shape[at : at + 1] = [factor, shape[at] // factor]
    return aten.reshape.default, shape


def roll(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    return aten.roll.default, [draw(st.integers(-3, 3))], [axis(draw, x)]


def flip(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    return aten.flip.default, [axis(draw, x)]


def pad(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    return aten.constant_pad_nd.default, [draw(st.integers(0, 2)), draw(st.integers(0, 2))]


def crop(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    at = axis(draw, x)
    first = draw(st.integers(0, x.shape[at] - 1))
    return aten.slice.Tensor, at, first, draw(st.integers(first + 1, x.shape[at]))


def split(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    at = axis(draw, x)
    return aten.split.Tensor, draw(st.integers(1, x.shape[at])), at


def select(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    at = axis(draw, x)
    return aten.select.int, at, draw(st.integers(0, x.shape[at] - 1))


def unsqueeze(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    return aten.unsqueeze.default, axis(draw, x)


def expand(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    return aten.expand.default, [draw(st.integers(1, 2)), *x.shape]


def reflect(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    target = draw(st.sampled_from((aten.reflection_pad2d.default, aten.replication_pad2d.default)))
    return target, [draw(st.integers(0, n - 1)) for n in (x.shape[-1], x.shape[-1], x.shape[-2], x.shape[-2])]


def im2col(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    size = [draw(st.integers(1, min(3, n))) for n in x.shape[-2:]]
    return aten.im2col.default, size, [1, 1], [draw(st.integers(0, 1))] * 2, [draw(st.integers(1, 2))] * 2


def shuffle(draw: Draw, x: Tensor) -> tuple[Any, ...]:
    if x.shape[1] % 4 == 0:
        return aten.pixel_shuffle.default, 2
    return (aten.pixel_unshuffle.default, 2) if all(n % 2 == 0 for n in x.shape[2:]) else (aten.clone.default,)


ANY: tuple[Callable[..., tuple[Any, ...]], ...] = (
    *(permute, transpose, reshape, roll, flip, pad, crop, split, select, unsqueeze, expand),
)
OF_IMAGES = (reflect, im2col, shuffle)


@given(st.data())
@MANY
def test_chains_of_movements_give_the_entries_that_torch_gives(data: st.DataObject) -> None:
    draw: Draw = data.draw
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    index = Roots().channels_first(shape) if len(shape) == 4 else Roots().rows_last(shape)
    columns = shape[1] if len(shape) == 4 else shape[-1]
    matrix = matrix_of(index, columns)
    value = gathered(index, matrix)
    assert torch.equal(to_matrix(value), matrix)
    for _ in range(draw(st.integers(1, 6))):
        if not 1 <= value.dim() <= 6 or value.numel() > 4000:
            break
        target, *args = draw(st.sampled_from(ANY + (OF_IMAGES if value.dim() == 4 else ())))(draw, value)
        if target is aten.clone.default:
            continue
        moved, value = index.moved(target, tuple(args), {}), target(value, *args)
        if isinstance(moved, list):
            part = draw(st.integers(0, len(moved) - 1))
            assert len(moved) == len(value)
            moved, value = moved[part], value[part]
        index = moved
        assert torch.equal(gathered(index, matrix), value)
    assert torch.equal(Gather(index, columns)(matrix), value)
    for at in range(value.dim()):
        check_channels(index, at, value, matrix)


def check_channels(index: Index, at: int, value: Tensor, matrix: Tensor) -> None:
    """What `channels` finds is true, and it finds what a definition finds."""
    found = index.channels(at)
    rows = torch.cat([matrix, torch.zeros_like(matrix[:1])])
    if found is None:
        lines = gathered(index, matrix).movedim(at, -1).reshape(-1, value.shape[at])
        first = int(index.columns.flatten()[0])
        window = rows[:, first : first + value.shape[at]]
        assert window.shape[1] < value.shape[at] or any(not (window == line).all(1).any() for line in lines)
        return
    part = rows[found.rows.long(), found.first : found.first + value.shape[at]]
    if not found.padded:
        assert torch.equal(part.reshape(value.movedim(at, -1).shape), value.movedim(at, -1))
    assert found.padded == bool((index.rows < 0).any())
    assert found.in_order == (found.rows.tolist() == list(range(index.length)))


def test_a_pad_with_another_value_is_no_movement() -> None:
    with pytest.raises(ValueError, match="another value"):
        Roots().rows_last((2, 3)).moved(aten.constant_pad_nd.default, ([1, 1], 1.0), {})


def test_movements_and_what_is_found_out_are_kept() -> None:
    index = Roots().rows_last((2, 3, 4))
    assert index.moved(aten.roll.default, ([1], [1]), {}) is index.moved(aten.roll.default, ([1], [1]), {})
    assert index.moved(aten.roll.default, ([1], [1]), {}) is not index.moved(aten.roll.default, ([2], [1]), {})
    assert index.channels(-1) is index.channels(2)


def test_how_values_meet() -> None:
    roots = Roots()
    x = roots.channels_first((2, 6, 3, 4))
    left, right = x.moved(aten.split.Tensor, (3, 1), {})
    gate = right.moved(aten.slice.Tensor, (1, 2, 3), {}).moved(aten.expand.default, ([2, 3, 3, 4],), {})
    means = roots.channels_first((2, 6, 1, 1)).moved(aten.expand.default, ([2, 6, 3, 4],), {})
    assert left.aligned(right) == Aligned(Broadcast.NONE, 3)
    assert right.aligned(left) == Aligned(Broadcast.NONE, -3)
    assert left.aligned(gate) == Aligned(Broadcast.COLUMN, 5)
    assert x.aligned(means) == Aligned(Broadcast.IMAGE, 0)
    assert x.aligned(x.moved(aten.roll.default, ([1], [3]), {})) is None
    assert x.aligned(x.moved(aten.flip.default, ([1],), {})) is None
    assert x.aligned(left) is None


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2), st.booleans(), st.booleans())
@MANY
def test_heads_of_windows(images: int, heads: int, width: int, third: int, flat: bool, padded: bool) -> None:
    """`qkv` of windows of 2 x 2 tokens, whose heads and windows may share an axis."""
    x = Roots().rows_last((images, 4, 6, 3 * heads * width))
    columns = 3 * heads * width
    matrix = matrix_of(x, columns)
    if padded:
        x = x.moved(aten.constant_pad_nd.default, ([0, 0, 0, 2, 0, 2],), {})
    high, wide = x.shape[1] // 2, x.shape[2] // 2
    for target, *args in (
        (aten.reshape.default, [images, high, 2, wide, 2, 3, heads, width]),
        (aten.permute.default, [5, 0, 1, 3, 6, 2, 4, 7]),
        (aten.select.int, 0, third),
        (aten.reshape.default, [-1, 4, width] if flat else [-1, heads, 4, width]),
    ):
        x = x.moved(target, tuple(args), {})
    found = find_heads(x)
    assert found is not None
    assert (found.first, found.heads, found.width) == (third * heads * width, heads, width)
    rows = torch.cat([matrix, torch.zeros_like(matrix[:1])])
    tokens = rows[torch.where(found.rows < 0, len(matrix), found.rows).long()]
    own = tokens[..., found.first : found.first + heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
    assert torch.equal(own.reshape(x.shape), gathered(x, matrix))
    result = result_index(x, found, tuple(x.shape))
    assert torch.equal(result.rows, x.rows)
    real = x.rows >= 0
    assert torch.equal(result.columns[real], (x.columns - found.first)[real])


def test_operands_that_are_no_heads() -> None:
    x = Roots().rows_last((4, 6, 8))
    turned = x.moved(aten.transpose.int, (1, 2), {})
    assert find_heads(turned) is None
    assert find_heads(Roots().rows_last((6, 8))) is None


def test_windows_of_a_shifted_image_are_stored_once_for_all_channels() -> None:
    """A large image has as many entries as tokens times channels: what moves tokens must not write them all out."""
    index = Roots().rows_last((1, 16, 24, 12))
    for target, args in (
        (torch.ops.aten.roll.default, ([-4, -4], [1, 2])),
        (torch.ops.aten.view.default, ([1, 2, 8, 3, 8, 12],)),
        (torch.ops.aten.permute.default, ([0, 1, 3, 2, 4, 5],)),
        (torch.ops.aten.reshape.default, ([-1, 64, 3, 2, 2],)),
        (torch.ops.aten.permute.default, ([2, 0, 3, 1, 4],)),
    ):
        index = index.moved(target, args, {})
    assert index.rows.untyped_storage().nbytes() == 4 * 16 * 24
    assert index.columns.untyped_storage().nbytes() == 4 * 12
    assert index.rows.shape == index.columns.shape == (3, 6, 2, 64, 2)
