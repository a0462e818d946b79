"""Upscaling of images of any size: padding to what the model's windows need, and tiles for what does not fit.

Tiles start at multiples of the window in the padded image, of which only one row of tiles is ever made. A window of
attention therefore sees the same pixels in a tile as in the whole image. Where the model's receptive field fits into
the overlap, the tiled result equals the whole one; otherwise only what reaches beyond the overlap differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from harmoq_ao.common.errors import ConfigError, InputError
from harmoq_ao.images.tensors import check_image_tensor, unit_floats
from harmoq_ao.sites.model import AuthorModel

Model = Callable[[torch.Tensor], torch.Tensor]
"""Maps `[B, C, H, W]` to `[B, C, H * scale, W * scale]`."""

Progress = Callable[[int, int], None]
"""Called after each tile with the number of tiles done and their total."""


@dataclass(frozen=True)
class TileSpan:
    """One tile along one axis, in input pixels: the model sees ``start:stop``, and ``keep_start:keep_stop`` is kept."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


def pad_to_multiple(x: torch.Tensor, multiple: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Mirror an image at its bottom and right edge until both sides are multiples of ``multiple``.

    The edge pixel is repeated (flip and concatenate, as SwinIR does at test time). An image smaller than the padding is
    mirrored back and forth, so a single pixel works.

    Args:
        x: `[..., H, W]`, not empty.
        multiple: At least 1.

    Returns:
        The padded image, and the `(H, W)` to crop back to (times the scale, after a model).

    Raises:
        ConfigError: If the multiple is below 1.
        InputError: If the image is empty.
    """
    _check_at_least("The window multiple", multiple, 1)
    height, width = x.shape[-2:]
    if height == 0 or width == 0:
        raise InputError("An empty image cannot be padded", found=f"shape {list(x.shape)}", expected="H and W above 0")
    for axis, size in ((-2, height), (-1, width)):
        if size % multiple:
            x = x.index_select(axis, _mirrored_indices(size, _round_up(size, multiple), x.device))
    return x, (height, width)


def tile_spans(size: int, tile: int, overlap: int) -> list[TileSpan]:
    """Cover ``size`` pixels with tiles of ``tile`` that share at least ``overlap``; seams halve what is shared.

    The last tile ends at the image's end, so no tile is smaller than the others and none reaches outside.
    """
    if size <= tile:
        return [TileSpan(0, size, 0, size)]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    seams = [0, *((later + earlier + tile) // 2 for earlier, later in pairwise(starts)), size]
    return [TileSpan(start, start + tile, seams[index], seams[index + 1]) for index, start in enumerate(starts)]


def upscale_rows(
    model: Model,
    image: torch.Tensor,
    scale: int,
    tile: int | None = None,
    overlap: int = 32,
    window_multiple: int = 1,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
    *,
    pad_multiple: int | None = None,
) -> Iterator[torch.Tensor]:
    """Upscale tile by tile and yield the finished rows from top to bottom, one row of tiles at a time.

    Besides the image, at most one row of tiles and its result are in memory.

    Args:
        model: The upscaler, in evaluation mode.
        image: `[B, C, H, W]`, floating and finite; or 8- or 16-bit codes (`torch.uint8`, `torch.uint16`), which become
            float32 in 0..1 a row of tiles at a time.
        scale: The model's upscaling factor.
        tile: Side of a tile in input pixels, rounded up to the window multiple; None takes the image whole.
        overlap: Pixels that adjacent tiles share, rounded up to the window multiple; below the tile.
        window_multiple: What the model's input sides must be multiples of.
        progress: Called after each tile.
        device: Where the model runs; each tile is moved there. The image's own device by default.
        pad_multiple: What the image is padded to multiples of, itself a multiple of the window multiple, which is the
            default.

    Returns:
        `[B, C', h, W * scale]` on the CPU, one after the other; the heights add up to ``H * scale``.

    Raises:
        ConfigError: If tile, overlap, scale or window multiple are out of range; while iterating, if ``scale`` is not
            the model's.
        InputError: If the image is not `[B, C, H, W]`, is empty, or is not finite.
    """
    if isinstance(model, AuthorModel):
        model = model.image
    check_image_tensor(image, batched=True, codes=True)
    _check_at_least("The scale", scale, 1)
    _check_at_least("The window multiple", window_multiple, 1)
    height, width = image.shape[-2:]
    padded = [_round_up(size, pad_multiple or window_multiple) for size in (height, width)]
    if tile is None:
        tile, overlap = max(padded), 0
    _check_at_least("The tile size", tile, 1)
    _check_at_least("The overlap", overlap, 0)
    tile, overlap = _round_up(tile, window_multiple), _round_up(overlap, window_multiple)
    if overlap >= tile:
        raise ConfigError(
            "The overlap leaves a tile nothing of its own",
            found=f"overlap {overlap}, tile {tile} (in pixels, rounded up to multiples of {window_multiple})",
            expected="an overlap below the tile size",
            remedy="use larger tiles or a smaller overlap",
        )
    grid = _Grid(
        _within(tile_spans(padded[0], tile, overlap), height), _within(tile_spans(padded[1], tile, overlap), width)
    )
    return _upscaled_rows(model, image, scale, grid, padded[1], progress, device)


def upscale(
    model: Model,
    image: torch.Tensor,
    scale: int,
    tile: int | None = None,
    overlap: int = 32,
    window_multiple: int = 1,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Upscale an image whole, or tile by tile, so that the model's memory depends on the tile and not on the image.

    Adjacent tiles share ``overlap`` pixels and each answers up to the middle of what is shared (a hard seam, not a
    blend): with an overlap of at least the receptive field the result is the one of the whole image.

    Args:
        model: As the other arguments, see `upscale_rows`, which gives the same result piece by piece.
        image: `[B, C, H, W]`, floating point, finite.
        scale: The model's upscaling factor.
        tile: Side of a tile in input pixels; None takes the image whole.
        overlap: Pixels that adjacent tiles share.
        window_multiple: What the model's input sides must be multiples of.
        progress: Called after each tile.
        device: Where the model runs.

    Returns:
        `[B, C', H * scale, W * scale]` on the CPU.

    Raises:
        ConfigError: Tile, overlap, scale or window multiple are out of range, or ``scale`` is not the model's.
        InputError: The image is not `[B, C, H, W]`, is empty, or is not finite.
    """
    if not isinstance(image, torch.Tensor) or not image.is_floating_point():
        check_image_tensor(image, batched=True)  # refuses integer codes, which only `upscale_rows` takes
    rows = upscale_rows(model, image, scale, tile, overlap, window_multiple, progress, device)
    return join_rows(rows, image.shape[-2] * scale)


def join_rows(bands: Iterable[torch.Tensor], height: int) -> torch.Tensor:
    """Bands `[B, C, h, W]` as one image `[B, C, height, W]`; a band that is the whole image is not copied."""
    output: torch.Tensor | None = None
    top = 0
    for band in bands:
        if band.shape[-2] == height:
            return band
        if output is None:
            output = band.new_empty((*band.shape[:2], height, band.shape[-1]))
        output[..., top : top + band.shape[-2], :] = band
        top += band.shape[-2]
    assert output is not None
    assert top == height
    return output


@dataclass(frozen=True)
class _Grid:
    """Tiles of an image. What is kept of a tile lies inside the image; what the model sees may be padding."""

    rows: list[TileSpan]
    columns: list[TileSpan]


def _within(spans: list[TileSpan], size: int) -> list[TileSpan]:
    """The spans without the tiles, and parts of tiles, whose result is padding only."""
    return [replace(span, keep_stop=min(span.keep_stop, size)) for span in spans if span.keep_start < size]


def _upscaled_rows(
    model: Model,
    image: torch.Tensor,
    scale: int,
    grid: _Grid,
    padded_width: int,
    progress: Progress | None,
    device: torch.device | str | None,
) -> Iterator[torch.Tensor]:
    for index, row in enumerate(grid.rows):
        done = index * len(grid.columns)

        def advance(column: int, done: int = done) -> None:
            if progress is not None:
                progress(done + column, len(grid.rows) * len(grid.columns))

        yield _upscaled_band(model, _padded_band(image, row, padded_width), scale, row, grid.columns, advance, device)


def _upscaled_band(
    model: Model,
    band: torch.Tensor,
    scale: int,
    row: TileSpan,
    columns: list[TileSpan],
    advance: Callable[[int], None],
    device: torch.device | str | None,
) -> torch.Tensor:
    """The part of the result that a row of tiles is kept for."""
    output: torch.Tensor | None = None
    height, width = row.keep_stop - row.keep_start, columns[-1].keep_stop
    top = (row.keep_start - row.start) * scale
    for done, column in enumerate(columns, start=1):
        part = _run(model, band[..., column.start : column.stop], scale, device)
        if output is None:
            output = part.new_empty((*part.shape[:2], height * scale, width * scale), device="cpu")
        target = output[..., column.keep_start * scale : column.keep_stop * scale]
        left = (column.keep_start - column.start) * scale
        target.copy_(part[..., top : top + target.shape[-2], left : left + target.shape[-1]])
        advance(done)
    assert output is not None
    return output


def _padded_band(image: torch.Tensor, row: TileSpan, width: int) -> torch.Tensor:
    """The rows that a row of tiles sees, as floats, mirrored where they reach beyond the image's bottom or right."""
    (rows, columns), device = image.shape[-2:], image.device
    if row.stop <= rows:
        band = unit_floats(image[..., row.start : row.stop, :])
    else:
        mirrored = _mirrored_indices(rows, row.stop, device)[row.start :]
        first, last = int(mirrored.min()), int(mirrored.max())
        band = unit_floats(image[..., first : last + 1, :]).index_select(-2, mirrored - first)
    return band if width == columns else band.index_select(-1, _mirrored_indices(columns, width, device))


def _run(model: Model, part: torch.Tensor, scale: int, device: torch.device | str | None) -> torch.Tensor:
    with torch.no_grad():
        result = model(part if device is None else part.to(device))
    expected = (part.shape[0], part.shape[-2] * scale, part.shape[-1] * scale)
    if result.ndim != 4 or (result.shape[0], *result.shape[-2:]) != expected:
        raise ConfigError(
            "The model's output does not fit the scale",
            found=f"output {list(result.shape)} for input {list(part.shape)}",
            expected=f"[{expected[0]}, C, {expected[1]}, {expected[2]}] at scale {scale}",
            remedy="pass the scale that the model was trained for",
        )
    return result


def _mirrored_indices(size: int, target: int, device: torch.device) -> torch.Tensor:
    phase = torch.arange(target, device=device) % (2 * size)
    return torch.where(phase < size, phase, 2 * size - 1 - phase)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_at_least(what: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise ConfigError(f"{what} is out of range", found=value, expected=f"an integer of at least {lowest}")
