"""Calibration data: seeded low-resolution crops from photographs, and where photographs come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset

from harmoq_ao.common.errors import CalibrationError, ConfigError, DatasetError, ImageError
from harmoq_ao.images.reading import EncodedImage, image_from_pillow, load_image
from harmoq_ao.images.records import ImageRecord, image_from_array
from harmoq_ao.images.tensors import check_image_tensor

ImageSource = str | Path | npt.NDArray[Any] | torch.Tensor | Image.Image | ImageRecord | EncodedImage
"""A file (also one in memory), an array as in `image_from_array`, a tensor `[3, H, W]` in 0..1, a Pillow image, or a
record."""

Orderable = TypeVar("Orderable", bound=Path | EncodedImage)

HELD_OUT_SHARE = 10
"""Of so many photographs one is kept aside to choose between states."""

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
"""scikit-image's pictures for calibration; half in colour. The second view of the motorcycle belongs to neither set."""

EVALUATION_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "camera.png")
"""scikit-image's pictures for evaluation: two in colour, one gray; none is used for calibration."""

# Bicubic reads two low-resolution pixels to each side; a crop downscaled with this margin is the whole image's.
_MARGIN = 3


class SizedImages(Protocol):
    """What crops are cut from: images by index, decoded one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class CalibrationCrops(Dataset[torch.Tensor]):
    """A fixed number of low-resolution crops `[3, size, size]`, float32, 0..1, at 8-bit precision.

    The images are taken in a seeded order, each for an equal share of consecutive crops, at seeded positions; crop
    ``i`` is the same whenever and in whatever order it is asked for. One decoded image is held at a time, so memory
    does not grow with the number of crops or images; random access decodes more often. Where an image is smaller than
    a crop, it is mirrored at its right and bottom edge until it is not.

    Args:
        images: What to cut from, see `ImageSource`; anything with a length and an index, such as `list_images`'s list.
        size: Side of a crop in low-resolution pixels.
        count: Number of crops.
        downscale: 1 if the images are low-resolution already; else photographs are made low-resolution by this factor
            (bicubic with antialiasing), crop by crop, equal to downscaling the whole image first.
        seed: Fixes the order of images and the positions.

    Raises:
        ConfigError: If size, count or downscale is below 1.
        CalibrationError: If there is no image.
        ImageError: When a crop is taken, if its image cannot be used.
    """

    def __init__(self, images: SizedImages, size: int = 64, count: int = 64, downscale: int = 1, seed: int = 0) -> None:
        for name, value in (("size", size), ("count", count), ("downscale", downscale)):
            if value < 1:
                raise ConfigError(
                    f"The {name} of calibration crops is out of range", found=value, expected="at least 1"
                )
        if len(images) == 0:
            raise CalibrationError(
                "There is nothing to calibrate on",
                found="0 images",
                expected="at least one image",
                remedy="pass a few photographs of the kind the model will upscale",
            )
        self.images, self.size, self.count, self.downscale, self.seed = images, size, count, downscale, seed
        self._order = [int(index) for index in np.random.default_rng(seed).permutation(len(images))]
        self._decoded: tuple[int, npt.NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"crop {index} of {self.count}")
        pixels, top, left = self._place(index)
        return _as_tensor(_low_resolution_crop(pixels, top, left, self.size, self.downscale))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(self.count))

    def reference(self, index: int) -> torch.Tensor:
        """The crop as the photograph has it, before it was made low-resolution: `[3, size * downscale, ...]`."""
        pixels, top, left = self._place(index)
        rows, columns = (slice(s * self.downscale, (s + self.size) * self.downscale) for s in (top, left))
        return _as_tensor(pixels[rows, columns])

    def _place(self, index: int) -> tuple[npt.NDArray[np.uint8], int, int]:
        pixels = self._decode(self._order[self._turn(index)])
        position = np.random.default_rng((self.seed, index))
        top = int(position.integers(pixels.shape[0] // self.downscale - self.size + 1))
        left = int(position.integers(pixels.shape[1] // self.downscale - self.size + 1))
        return pixels, top, left

    def _turn(self, index: int) -> int:
        """With more images than crops the first of the order get one each; otherwise all get equal shares."""
        return index if len(self._order) >= self.count else index * len(self._order) // self.count

    def _decode(self, index: int) -> npt.NDArray[np.uint8]:
        if self._decoded is None or self._decoded[0] != index:
            self._decoded = None  # before decoding the next, so that never two are held
            pixels = as_record(self.images[index]).to_uint8()
            self._decoded = (index, _mirrored_to(pixels, self.size * self.downscale))
        return self._decoded[1]


@dataclass(frozen=True)
class ImageColumn:
    """The images of a data set's column, decoded when asked for; indexable where the data set is."""

    rows: Any
    column: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageRecord:
        return self._record(self.rows[index])

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self._record(row) for row in self.rows)

    def _record(self, row: Any) -> ImageRecord:
        if self.column is None:
            return as_record(row)
        if not isinstance(row, Mapping) or self.column not in row:
            raise DatasetError(
                "A row has no image column",
                found=f"columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__,
                expected=f"a column '{self.column}'",
                remedy="name the column of images",
            )
        return as_record(row[self.column])


def as_record(source: ImageSource | Mapping[str, Any]) -> ImageRecord:
    """Any source of an image as a record; also the undecoded cell ``{"bytes": ..., "path": ...}`` of Hugging Face.

    Raises:
        ImageError: If the source is of no known kind or cannot be decoded.
        InputError: If a tensor is not `[3, H, W]` or `[1, H, W]` and finite.
    """
    if isinstance(source, ImageRecord):
        return source
    if isinstance(source, str | Path):
        return load_image(source)
    if isinstance(source, EncodedImage):
        return source.load()
    if isinstance(source, np.ndarray):
        return image_from_array(source)
    if isinstance(source, Image.Image):
        return image_from_pillow(source)
    if isinstance(source, torch.Tensor):
        check_image_tensor(source, batched=False)
        return image_from_array(source.detach().float().clamp(0.0, 1.0).movedim(0, -1).cpu().numpy())
    if isinstance(source, Mapping) and ("bytes" in source or "path" in source):
        return _from_cell(source)
    raise ImageError(
        "This is not an image",
        found=type(source).__name__,
        expected="a path, an array, a tensor [3, H, W], a Pillow image or an ImageRecord",
    )


def from_hf_dataset(dataset: Any, column: str | None = None) -> ImageColumn:
    """The images of a Hugging Face data set that is already loaded, or of any iterable of rows or images.

    Args:
        dataset: A ``datasets.Dataset`` or ``IterableDataset``, or rows (mappings) or images of `ImageSource`'s kinds.
        column: The column of images. By default the only one of type ``datasets.Image``, or, without such types, the
            first row's only image.

    Returns:
        Records one by one; usable as ``CalibrationCrops(images=...)`` where the data set has a length.

    Raises:
        DatasetError: If the column does not exist, or cannot be chosen because there are none or several.
    """
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and features:
        return ImageColumn(dataset, choose_column(column, list(features), image_features(features)))
    first = next(iter(dataset), None)
    if first is None:
        raise DatasetError("The data set is empty", found="0 rows", expected="at least one image")
    if not isinstance(first, Mapping):
        return ImageColumn(dataset, None)
    return ImageColumn(dataset, choose_column(column, list(first), [name for name in first if _is_image(first[name])]))


def skimage_photographs(split: Literal["calibration", "evaluation"]) -> dict[str, Path]:
    """Photographs that come inside scikit-image's package; nothing is downloaded.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; the two share no picture.

    Returns:
        Path by name (without suffix), in the order of `CALIBRATION_PHOTOGRAPHS` or `EVALUATION_PHOTOGRAPHS`.

    Raises:
        DatasetError: If the split is unknown, or the installed scikit-image does not carry a picture.
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


def _low_resolution_crop(
    pixels: npt.NDArray[np.uint8], top: int, left: int, size: int, scale: int
) -> npt.NDArray[np.uint8]:
    """`[size, size, 3]` at low-resolution position ``(top, left)`` of the image downscaled by ``scale``."""
    if scale == 1:
        return pixels[top : top + size, left : left + size]
    above, beside = min(_MARGIN, top), min(_MARGIN, left)
    rows = min(top + size + _MARGIN, pixels.shape[0] // scale) - (top - above)
    columns = min(left + size + _MARGIN, pixels.shape[1] // scale) - (left - beside)
    region = pixels[
        (top - above) * scale : (top - above + rows) * scale,
        (left - beside) * scale : (left - beside + columns) * scale,
    ]
    small = np.asarray(Image.fromarray(region).resize((columns, rows), Image.Resampling.BICUBIC))
    return small[above : above + size, beside : beside + size]


def _as_tensor(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(255.0)).movedim(-1, 0).contiguous()


def _mirrored_to(pixels: npt.NDArray[np.uint8], least: int) -> npt.NDArray[np.uint8]:
    below, right = max(0, least - pixels.shape[0]), max(0, least - pixels.shape[1])
    if below == 0 and right == 0:
        return pixels
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="symmetric")


def _from_cell(cell: Mapping[str, Any]) -> ImageRecord:
    data = cell.get("bytes")
    if data is None:
        path = cell.get("path")
        if path is None:
            raise ImageError("A cell holds no image", found="neither bytes nor a path", remedy="leave the row out")
        return load_image(path)
    if not isinstance(data, bytes):
        raise ImageError("A cell holds no image", found=type(data).__name__, expected="the bytes of an image file")
    return EncodedImage(0, str(cell.get("path") or "A cell's image"), data).load()


def choose_column(wanted: str | None, columns: Sequence[str], candidates: Sequence[str]) -> str:
    """The column asked for, or else the only candidate.

    Raises:
        DatasetError: It does not exist, or there are none or several candidates; all columns are listed.
    """
    if wanted is not None and wanted not in columns:
        raise DatasetError(
            "The data set has no such column", found=f"columns {', '.join(columns)}", expected=f"'{wanted}' among them"
        )
    if wanted is not None:
        return wanted
    if len(candidates) != 1:
        raise DatasetError(
            "The column of images is not clear",
            found=f"image columns: {', '.join(candidates) or 'none'}; all columns: {', '.join(columns)}",
            expected="exactly one column of images",
            remedy="name the column of images",
        )
    return candidates[0]


def image_features(features: Mapping[str, Any]) -> list[str]:
    """Names of the columns that hold images, by their types."""
    # Whoever passes a Hugging Face data set has the package; nobody else pays for the import.
    from datasets import Image as ImageFeature

    # A Parquet file that no such library wrote has the parts of a cell, and not the type.
    return [
        name
        for name, feature in features.items()
        if isinstance(feature, ImageFeature) or (isinstance(feature, Mapping) and set(feature) == {"bytes", "path"})
    ]


def _is_image(cell: Any) -> bool:
    if isinstance(cell, np.ndarray | torch.Tensor):
        return cell.ndim in (2, 3)
    return isinstance(cell, Image.Image | ImageRecord | Path) or (isinstance(cell, Mapping) and "bytes" in cell)


def split_photographs(files: Sequence[Orderable], seed: int = 0) -> tuple[list[Orderable], list[Orderable]]:
    """Photographs to learn from, and one in ten, at least one, kept aside; a single one is not split.

    Args:
        files: Photographs, in any order that is always the same.
        seed: Of the choice.
    """
    if len(files) < 2:
        return list(files), []
    order = [files[int(index)] for index in np.random.default_rng(seed).permutation(len(files))]
    kept = max(1, len(files) // HELD_OUT_SHARE)
    return sorted(order[kept:]), sorted(order[:kept])
