"""Upscaling of images of any size: padding to what the model's windows need, and tiles for what does not fit.

Tiles start at multiples of the window, of an image that was padded once as a whole. So a window of attention sees the
same pixels in a tile as in the whole image, and where the model's receptive field fits into the overlap the tiled
result equals the whole one; what differs otherwise is only what reaches beyond the overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from harmoq_ao.data.images import check_image_tensor
from harmoq_ao.errors import ConfigError, InputError

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


def upscale_tiled(
    model: Model,
    image: torch.Tensor,
    scale: int,
    tile: int,
    overlap: int = 32,
    window_multiple: int = 1,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Upscale tile by tile, so that the model's memory depends on the tile and not on the image.

    Adjacent tiles share ``overlap`` pixels and each answers up to the middle of what is shared (a hard seam, not a
    blend): with an overlap of at least the receptive field the result is the one of the whole image.

    Args:
        model: The upscaler, in evaluation mode.
        image: `[B, C, H, W]`, floating, finite.
        scale: The model's upscaling factor.
        tile: Side of a tile in input pixels, rounded up to the window multiple.
        overlap: Pixels that adjacent tiles share, rounded up to the window multiple; below the tile.
        window_multiple: What the model's input sides must be multiples of.
        progress: Called after each tile.
        device: Where the model runs; each tile is moved there. The image's own device by default.

    Returns:
        `[B, C', H * scale, W * scale]` on the CPU.

    Raises:
        ConfigError: If tile, overlap, scale or window multiple are out of range, or ``scale`` is not the model's.
        InputError: If the image is not `[B, C, H, W]`, is empty, or is not finite.
    """
    check_image_tensor(image, batched=True)
    _check_at_least("The scale", scale, 1)
    _check_at_least("The window multiple", window_multiple, 1)
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
    padded, size = pad_to_multiple(image, window_multiple)
    rows, columns = (tile_spans(padded.shape[axis], tile, overlap) for axis in (-2, -1))
    return _assemble(model, padded, scale, rows, columns, size, progress, device)


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
    """Upscale an image whole (``tile=None``) or in tiles; arguments, result and errors as in `upscale_tiled`."""
    if tile is not None:
        return upscale_tiled(model, image, scale, tile, overlap, window_multiple, progress, device)
    check_image_tensor(image, batched=True)
    _check_at_least("The scale", scale, 1)
    padded, size = pad_to_multiple(image, window_multiple)
    whole = [[TileSpan(0, length, 0, length)] for length in padded.shape[-2:]]
    return _assemble(model, padded, scale, whole[0], whole[1], size, progress, device)


def _assemble(
    model: Model,
    padded: torch.Tensor,
    scale: int,
    rows: list[TileSpan],
    columns: list[TileSpan],
    size: tuple[int, int],
    progress: Progress | None,
    device: torch.device | str | None,
) -> torch.Tensor:
    height, width = size
    output: torch.Tensor | None = None
    spans = [(row, column) for row in rows for column in columns]
    for done, (row, column) in enumerate(spans, start=1):
        part = _run(model, padded[..., row.start : row.stop, column.start : column.stop], scale, device)
        if output is None:
            output = part.new_empty((*part.shape[:2], height * scale, width * scale), device="cpu")
        # Slices past the image end are what padding added; they select nothing there and the source is cut to match.
        target = output[
            ...,
            row.keep_start * scale : row.keep_stop * scale,
            column.keep_start * scale : column.keep_stop * scale,
        ]
        top, left = (row.keep_start - row.start) * scale, (column.keep_start - column.start) * scale
        target.copy_(part[..., top : top + target.shape[-2], left : left + target.shape[-1]])
        if progress is not None:
            progress(done, len(spans))
    assert output is not None
    return output


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
