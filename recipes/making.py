"""Making the quantized model of a cell: photographs to crops, the method with its settings, and the trace it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import harmoq_ao as h
from harmoq_ao.baselines import BASELINES
from harmoq_ao.baselines.methods import check_method, prepare_with
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.harmonization.apply import harmonize
from harmoq_ao.harmonization.presets import HarmonizeSettings, preset
from harmoq_ao.images import CalibrationCrops, list_images, luma, split_photographs
from harmoq_ao.recipes.cells import HARMOQ, Cell, harmonize_settings, to_plain
from harmoq_ao.zoo import LoadedModel


class Photographs:
    """The photographs of a folder, split once and for all into those to calibrate on and those to stop early on.

    Args:
        folder: Searched with its subfolders.
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
        self.folder, self.seed = folder, seed
        self.calibration, self.held_out = split_photographs(files, seed)
        self._cut: dict[Any, list[Tensor]] = {}

    def digest(self) -> str:
        """Changes when a photograph is added, removed or changes its size on disk."""
        return files_digest(self.folder, [*self.calibration, *self.held_out])

    def crops(self, loaded: LoadedModel, count: int, size: int, held_out: bool = False) -> list[Tensor]:
        """Low-resolution crops `[C, size, size]` in 0..1 for a model, the same for every cell."""
        channels = loaded.input_channels
        key = (loaded.scale, channels, count, size, held_out)
        if key not in self._cut:
            files = self.held_out if held_out else self.calibration
            cut = CalibrationCrops(files, size, count, loaded.scale, self.seed)
            self._cut[key] = [crop if channels == 3 else luma(crop) for crop in cut]
        return self._cut[key]


def files_digest(folder: Path, files: Sequence[Path]) -> str:
    """SHA-256 of the names below `folder` and the sizes on disk, shortened."""
    listed = sorted(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}" for file in files)
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Made:
    """A quantized model and what its making left behind.

    Args:
        prepared: Calibrated, with fake-quantization on.
        trace: Objectives and losses by stage, where the method has a trace.
    """

    prepared: h.PreparedModel
    trace: dict[str, Any] | None = None


def settings_of(cell: Cell) -> HarmonizeSettings:
    """The preset of a cell with its options applied.

    Raises:
        ConfigError: Unknown method, preset or option.
    """
    check_method(cell.method)
    own = [name for name, _ in cell.options if name.partition(".")[0] in ("algorithm", "refine")]
    if own and cell.method != HARMOQ:
        raise ConfigError(f"{cell.method} has no such option", found=own[0], expected="config.*, crops, crop_size")
    return harmonize_settings(preset(cell.preset), cell)


def plain_settings(cell: Cell) -> dict[str, Any]:
    """What besides the cell's own fields decides its numbers, as JSON: of the preset what its method looks at."""
    if cell.is_reference:
        return {}
    plain: dict[str, Any] = to_plain(settings_of(cell))
    if cell.method == HARMOQ or BASELINES[cell.method].learns:
        return plain
    return {name: plain[name] for name in ("crops", "crop_size")}


def quantize(
    cell: Cell,
    loaded: LoadedModel,
    photographs: Photographs,
    device: str,
    checkpoint: Path,
) -> Made:
    """Quantize the float model by the cell's method.

    Args:
        cell: What to do.
        loaded: The float model, on `device`.
        photographs: Where crops come from.
        device: Where the crops go.
        checkpoint: Where a long refinement keeps its progress.
    """
    settings = settings_of(cell)
    crops = [c.to(device) for c in photographs.crops(loaded, settings.crops, settings.crop_size)]
    others = [c.to(device) for c in photographs.crops(loaded, settings.held_out, settings.crop_size, held_out=True)]
    config = cell.config(photographs.seed)
    if cell.method != HARMOQ:
        return Made(prepare_with(cell.method, loaded, crops, config, preset=cell.preset, held_out=others))
    prepared = h.prepare_harmoq(loaded, config)
    h.calibrate(prepared, crops)
    trace = harmonize(prepared, crops, settings, held_out=others, checkpoint=checkpoint)
    return Made(prepared, trace.to_dict())
