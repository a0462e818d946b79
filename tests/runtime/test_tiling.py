"""Padding and tiling: the result has the right size, no seams, and no tile is larger than asked for."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harmoq_ao.common.errors import ConfigError, InputError
from harmoq_ao.runtime.tiling import pad_to_multiple, tile_spans, upscale, upscale_rows

RADIUS = 3
"""How far `conv_net` reaches to each side, in pixels."""


def conv_net(scale: int = 2, seed: int = 0) -> nn.Module:
    """Three zero-padded 3x3 convolutions and a pixel shuffle: a receptive field of 7 pixels."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh())
    return nn.Sequential(*layers, nn.Conv2d(6, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)).eval()


class WindowNet(nn.Module):
    """Mixes all pixels of each aligned window, as window attention does, and takes no other size."""

    def __init__(self, window: int, scale: int) -> None:
        super().__init__()
        self.window, self.scale, self.seen = window, scale, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        assert height % self.window == 0
        assert width % self.window == 0
        self.seen = max(self.seen, height, width)
        means = nn.functional.avg_pool2d(x, self.window)
        mixed = x + means.repeat_interleave(self.window, -1).repeat_interleave(self.window, -2)
        return mixed.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    tile=st.integers(8, 40),
    extra=st.integers(0, 4),
    multiple=st.sampled_from([1, 4, 5]),
    scale=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=60, deadline=None)
def test_tiles_have_no_seams_where_the_receptive_field_fits(
    height: int, width: int, tile: int, extra: int, multiple: int, scale: int
) -> None:
    overlap = 2 * RADIUS + 1 + extra
    tile = max(tile, overlap + multiple + 1)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * 61 + width))
    model = conv_net(scale)
    whole = upscale(model, image, scale, window_multiple=multiple)
    tiled = upscale(model, image, scale, tile=tile, overlap=overlap, window_multiple=multiple)
    assert whole.shape == tiled.shape == (1, 3, height * scale, width * scale)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_too_small_an_overlap_is_visible() -> None:
    """The seam test above can fail: without overlap the zero padding of each tile shows."""
    image = torch.rand(1, 3, 40, 40)
    model = conv_net()
    difference = upscale(model, image, 2, tile=16, overlap=0) - upscale(model, image, 2)
    assert difference.abs().max() > 1e-3


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    window=st.sampled_from([4, 7, 8]),
    tiles=st.integers(1, 3),
    scale=st.sampled_from([2, 3]),
)
@settings(max_examples=40, deadline=None)
def test_windows_of_tiles_are_the_windows_of_the_image(
    height: int, width: int, window: int, tiles: int, scale: int
) -> None:
    model = WindowNet(window, scale)
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height * 71 + width))
    whole = upscale(model, image, scale, window_multiple=window)
    model.seen = 0
    tiled = upscale(model, image, scale, tile=tiles * window - 1, overlap=0, window_multiple=window)
    assert whole.shape == (2, 3, height * scale, width * scale)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    assert model.seen <= tiles * window


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (37, 1), (2, 3)])
@pytest.mark.parametrize("tile", [None, 16])
def test_slivers_work(size: tuple[int, int], tile: int | None) -> None:
    image = torch.rand(1, 3, *size)
    result = upscale(WindowNet(8, 2), image, 2, tile=tile, overlap=8, window_multiple=8)
    assert result.shape == (1, 3, size[0] * 2, size[1] * 2)
    assert torch.isfinite(result).all()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 33))
def test_padding_mirrors_as_numpy_does(height: int, width: int, multiple: int) -> None:
    x = torch.arange(2 * height * width, dtype=torch.float32).reshape(1, 2, height, width)
    padded, size = pad_to_multiple(x, multiple)
    assert size == (height, width)
    below, right = -height % multiple, -width % multiple
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, below), (0, right)), mode="symmetric")
    np.testing.assert_array_equal(padded.numpy(), expected)


def test_padding_of_a_large_image_is_flip_and_concatenate() -> None:
    x = torch.rand(1, 3, 13, 10)
    padded, _ = pad_to_multiple(x, 8)
    flipped = torch.cat([x, x.flip(2)], 2)[:, :, :16]
    flipped = torch.cat([flipped, flipped.flip(3)], 3)[:, :, :, :16]
    assert torch.equal(padded, flipped)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 63))
def test_spans_cover_the_axis_once_with_context_on_both_sides(size: int, tile: int, overlap: int) -> None:
    overlap = min(overlap, tile - 1)
    spans = tile_spans(size, tile, overlap)
    assert spans[0].keep_start == 0
    assert spans[-1].keep_stop == size
    for span in spans:
        assert 0 <= span.start <= span.keep_start < span.keep_stop <= span.stop <= size
        assert span.stop - span.start == min(tile, size)
    for earlier, later in pairwise(spans):
        assert earlier.keep_stop == later.keep_start
        assert later.keep_start - later.start >= overlap // 2
        assert earlier.stop - earlier.keep_stop >= overlap // 2


def test_progress_counts_tiles() -> None:
    calls: list[tuple[int, int]] = []
    upscale(conv_net(), torch.rand(1, 3, 40, 20), 2, 16, 8, progress=lambda *call: calls.append(call))
    assert calls == [(done, 8) for done in range(1, 9)]


def test_output_keeps_type_channels_and_needs_no_gradient() -> None:
    model = nn.Conv2d(3, 1, 1).to(torch.bfloat16)
    result = upscale(model, torch.rand(2, 3, 20, 9, dtype=torch.bfloat16), 1, tile=8, overlap=2)
    assert result.dtype == torch.bfloat16
    assert result.shape == (2, 1, 20, 9)
    assert not result.requires_grad


IMAGE = torch.rand(1, 3, 20, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 8, "overlap": 8}, "Found: overlap 8, tile 8"),
        (
            {"tile": 8, "overlap": 5, "window_multiple": 8},
            "overlap 8, tile 8 (in pixels, rounded up to multiples of 8)",
        ),
        ({"tile": 0}, "The tile size is out of range. Found: 0"),
        ({"tile": 8, "overlap": -1}, "The overlap is out of range. Found: -1"),
        ({"window_multiple": 0}, "The window multiple is out of range. Found: 0"),
        ({"scale": 0}, "The scale is out of range. Found: 0"),
        ({"scale": 3}, "does not fit the scale. Found: output [1, 3, 40, 40] for input [1, 3, 20, 20]"),
        ({"scale": 3, "tile": 16, "overlap": 4}, "Expected: [1, C, 48, 48] at scale 3"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        upscale(conv_net(), IMAGE, **{"scale": 2, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (IMAGE[0], "wrong rank. Found: shape [3, 20, 20]"),
        (IMAGE[:, :, :0], "is empty. Found: shape [1, 3, 0, 20]"),
        (IMAGE.to(torch.uint8), "wrong type. Found: torch.uint8"),
        (torch.full((1, 3, 4, 4), math.inf), "48 NaN or infinite values of 48"),
        (torch.full((1, 3, 4, 4), math.nan), "48 NaN or infinite values of 48"),
    ],
)
@pytest.mark.parametrize("tile", [None, 16])
def test_bad_images_are_named(image: torch.Tensor, message: str, tile: int | None) -> None:
    with pytest.raises(InputError) as caught:
        upscale(conv_net(), image, 2, tile=tile, overlap=4)
    assert message in str(caught.value)


def test_padding_refuses_an_empty_image() -> None:
    with pytest.raises(InputError, match=r"An empty image cannot be padded"):
        pad_to_multiple(torch.zeros(1, 3, 0, 4), 8)


# --- rows as they come ------------------------------------------------------------------------------------------------


def at_once(model: nn.Module, image: torch.Tensor, scale: int, tile: int, overlap: int, multiple: int) -> torch.Tensor:
    """What tiling means: the whole image padded, every tile run, each result put into its place."""
    padded, (height, width) = pad_to_multiple(image, multiple)
    tile, overlap = -(-tile // multiple) * multiple, -(-overlap // multiple) * multiple
    output = torch.full((*image.shape[:2], padded.shape[-2] * scale, padded.shape[-1] * scale), math.nan)
    for row in tile_spans(padded.shape[-2], tile, overlap):
        for column in tile_spans(padded.shape[-1], tile, overlap):
            with torch.no_grad():
                part = model(padded[..., row.start : row.stop, column.start : column.stop])
            rows, columns = (slice(span.keep_start * scale, span.keep_stop * scale) for span in (row, column))
            inner = part[..., (row.keep_start - row.start) * scale :, (column.keep_start - column.start) * scale :]
            output[..., rows, columns] = inner[..., : rows.stop - rows.start, : columns.stop - columns.start]
    return output[..., : height * scale, : width * scale]


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    tile=st.integers(1, 40),
    overlap=st.integers(0, 20),
    multiple=st.sampled_from([1, 4, 5]),
    scale=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 9),
)
def test_rows_are_the_image_bit_for_bit(
    height: int, width: int, tile: int, overlap: int, multiple: int, scale: int, seed: int
) -> None:
    tile = -(-tile // multiple) * multiple
    overlap = min(overlap, tile - multiple)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    model = conv_net(scale)
    expected = at_once(model, image, scale, tile, overlap, multiple)
    bands = list(upscale_rows(model, image, scale, tile, overlap, multiple))
    assert torch.equal(torch.cat(bands, -2), expected)
    assert torch.equal(upscale(model, image, scale, tile, overlap, multiple), expected)
    assert max(band.shape[-2] for band in bands) <= tile * scale
    assert all(band.shape[-1] == width * scale for band in bands)


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    multiple=st.sampled_from([1, 4]),
    pad=st.integers(1, 8),
    dtype=st.sampled_from([torch.uint8, torch.uint16]),
    tile=st.sampled_from([None, 8]),
)
def test_codes_become_floats_by_the_way(
    height: int, width: int, multiple: int, pad: int, dtype: torch.dtype, tile: int | None
) -> None:
    largest = {torch.uint8: 255, torch.uint16: 65535}[dtype]
    numbers = torch.randint(0, largest + 1, (2, height, width, 3), generator=torch.Generator().manual_seed(height))
    codes, floats = numbers.to(dtype).permute(0, 3, 1, 2), (numbers.float() / largest).permute(0, 3, 1, 2).contiguous()
    options: dict[str, Any] = {"tile": tile, "overlap": 4, "window_multiple": multiple, "pad_multiple": pad * multiple}
    results = [torch.cat(list(upscale_rows(conv_net(), x, 2, **options)), -2) for x in (codes, floats)]
    assert results[0].shape == (2, 3, 2 * height, 2 * width)
    assert torch.equal(*results)


def test_padding_to_more_than_the_window_is_as_padding_before() -> None:
    image = torch.rand(1, 3, 10, 50)
    padded, _ = pad_to_multiple(image, 32)
    for tile in (None, 8, 16):
        rows = upscale_rows(conv_net(), image, 2, tile, 4, pad_multiple=32)
        assert torch.equal(torch.cat(list(rows), -2), upscale(conv_net(), padded, 2, tile, 4)[..., :20, :100])


def test_a_row_of_tiles_is_run_when_it_is_asked_for() -> None:
    calls: list[tuple[int, int]] = []
    rows = upscale_rows(conv_net(), torch.rand(1, 3, 40, 20), 2, 16, 8, progress=lambda *call: calls.append(call))
    assert calls == []
    next(rows)
    assert calls == [(1, 8), (2, 8)]
    next(rows)
    assert calls[-1] == (4, 8)
    assert len(list(rows)) == 2


def test_what_is_wrong_with_the_arguments_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="overlap"):
        upscale_rows(conv_net(), IMAGE, 2, 8, 8)
    with pytest.raises(InputError, match="NaN"):
        upscale_rows(conv_net(), IMAGE * math.nan, 2, 8, 4)
    with pytest.raises(InputError, match=r"torch\.int32"):
        upscale_rows(conv_net(), IMAGE.int(), 2, 8, 4)


def test_one_value_that_is_no_number_is_found_in_any_layout() -> None:
    for value in (math.nan, math.inf, -math.inf):
        for layout in (torch.contiguous_format, torch.channels_last):
            image = torch.rand(1, 3, 9, 9).contiguous(memory_format=layout)
            image[0, 1, 4, 4] = value
            with pytest.raises(InputError, match="1 NaN or infinite values of 243"):
                upscale(conv_net(), image, 2)
