"""Photographs for calibration: those that scikit-image carries, and the split into learned and held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from harmoq_ao.common.errors import DatasetError
from harmoq_ao.images.reading import EncodedImage

Orderable = TypeVar("Orderable", bound=Path | EncodedImage)


HELD_OUT_SHARE = 10
"""One of this many photographs is held out, to choose between states of a refinement."""


CALIBRATION_PHOTOGRAPHS = (
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "coins.png",
)
"""scikit-image's pictures for calibration, half in colour. The second view of the motorcycle is in neither set."""


EVALUATION_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "camera.png")
"""scikit-image's pictures for evaluation: two in colour, one gray; disjoint from those for calibration."""


def skimage_photographs(split: Literal["calibration", "evaluation"]) -> dict[str, Path]:
    """Photographs that the scikit-image package carries; nothing is downloaded.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; the two share no picture.

    Returns:
        Path by name (without suffix), in the order of `CALIBRATION_PHOTOGRAPHS` or `EVALUATION_PHOTOGRAPHS`.

    Raises:
        DatasetError: The split is unknown, or the installed scikit-image lacks a picture.
    """
    names = {"calibration": CALIBRATION_PHOTOGRAPHS, "evaluation": EVALUATION_PHOTOGRAPHS}.get(split)
    if names is None:
        raise DatasetError("There is no such split", found=split, expected="'calibration' or 'evaluation'")
    # The package's own folder, not skimage.data's functions: those download what a release does not carry.
    folder = Path(str(files("skimage"))) / "data"
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DatasetError(
            "The installed scikit-image lacks photographs",
            found=f"no {', '.join(missing)} in {folder}",
            remedy="install scikit-image from its wheel, or pass your own images",
        )
    return {Path(name).stem: folder / name for name in names}


def split_photographs(files: Sequence[Orderable], seed: int = 0) -> tuple[list[Orderable], list[Orderable]]:
    """Split photographs into those to learn from and held-out ones, one in ten and at least one; one alone is learned.

    Args:
        files: Photographs, in a reproducible order.
        seed: Seed of the choice.

    Returns:
        Learned and held-out photographs, both sorted.
    """
    if len(files) < 2:
        return list(files), []
    order = [files[int(index)] for index in np.random.default_rng(seed).permutation(len(files))]
    kept = max(1, len(files) // HELD_OUT_SHARE)
    return sorted(order[kept:]), sorted(order[:kept])
