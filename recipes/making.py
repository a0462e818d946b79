"""Quantizing the model of a cell: photographs to crops, the method with its settings, and the trace it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.baselines.bits_by_patch import BitsByPatch, prepare_by_patch
from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.images import list_images, luma, split_photographs
from harmoq_ao.recipes.cells import HARMOQ, Cell, digest
from harmoq_ao.zoo import LoadedModel


class Photographs:
    """The photographs of a folder, split into those to calibrate on and those held out for early stopping.

    Args:
        folder: Searched recursively.
        seed: Of the split and of the crops.

    Raises:
        DatasetError: There is no image.
        CalibrationError: There is only one.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        files = list_images(folder, recursive=True)
        if len(files) < 2:
            raise CalibrationError(
                "One photograph cannot be split into calibration and held-out crops",
                found=f"{len(files)} in {folder}",
                expected="at least two",
                remedy="add photographs to the folder",
            )
        self.seed, self.digest = seed, files_digest(folder, files)
        self.calibration, self.held_out = split_photographs(files, seed)
        self._cut = cache(self._uncached)

    def crops(self, loaded: LoadedModel, count: int, size: int, held_out: bool = False) -> list[Tensor]:
        """Low-resolution crops `[C, size, size]` in 0..1 for a model, the same for every cell."""
        return self._cut(loaded.scale, loaded.input_channels, count, size, held_out)

    def _uncached(self, scale: int, channels: int, count: int, size: int, held_out: bool) -> list[Tensor]:
        files = self.held_out if held_out else self.calibration
        cut = h.CalibrationCrops(files, size, count, scale, self.seed)
        return [crop if channels == 3 else luma(crop) for crop in cut]


def files_digest(folder: Path, files: Sequence[Path]) -> str:
    """Digest of the names below `folder` and the sizes on disk: it changes when a file does."""
    return digest(sorted((file.relative_to(folder).as_posix(), file.stat().st_size) for file in files))


class Made(NamedTuple):
    """A calibrated model with fake-quantization on, and objectives and losses by stage where the method has a trace."""

    prepared: h.PreparedModel
    trace: dict[str, Any] | None = None


def quantize(cell: Cell, loaded: LoadedModel, photographs: Photographs, device: torch.device, checkpoint: Path) -> Made:
    """Quantize the float model by the cell's method.

    Args:
        cell: Method, bits and settings.
        loaded: The float model, on `device`.
        photographs: Source of the crops.
        device: Where the crops go.
        checkpoint: Where a method that learns keeps its progress.

    Raises:
        ConfigError: See :meth:`Cell.settings`.
    """
    settings, config = cell.settings(), cell.config(photographs.seed)
    crops = [c.to(device) for c in photographs.crops(loaded, settings.crops, settings.crop_size)]
    others = [c.to(device) for c in photographs.crops(loaded, settings.held_out, settings.crop_size, held_out=True)]
    if cell.method != HARMOQ:
        prepared = h.prepare_with(
            cell.method, loaded, crops, config, preset=cell.preset, held_out=others, checkpoint=checkpoint
        )
        return Made(prepared)
    prepared = h.calibrate(h.prepare_harmoq(loaded, config), crops)
    trace = h.harmonize(prepared, crops, settings, held_out=others, checkpoint=checkpoint)
    return Made(prepared, trace.to_dict())


def quantize_by_patch(cell: Cell, loaded: LoadedModel, photographs: Photographs, device: torch.device) -> BitsByPatch:
    """The model of a cell whose bits belong to patches (:attr:`Cell.by_patch`); as for :func:`quantize`."""
    settings = cell.settings()
    crops = [c.to(device) for c in photographs.crops(loaded, settings.crops, settings.crop_size)]
    return prepare_by_patch(loaded, crops, cell.config(photographs.seed))
