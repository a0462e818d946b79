"""Images from Python objects: any source as a record, and the image column of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from harmoq_ao.common.errors import DatasetError, ImageError
from harmoq_ao.images.reading import EncodedImage, image_from_pillow, load_image
from harmoq_ao.images.records import ImageRecord, image_from_array
from harmoq_ao.images.tensors import check_image_tensor

ImageSource = str | Path | npt.NDArray[Any] | torch.Tensor | Image.Image | ImageRecord | EncodedImage
"""A file (also one in memory), an array as in `image_from_array`, a tensor `[3, H, W]` in 0..1, a Pillow image, or a
record."""


@dataclass(frozen=True)
class ImageColumn:
    """The images of a data set's column, decoded on access; indexable where the data set is.

    Attributes:
        rows: The data set, or an iterable of rows.
        column: Name of the column; None where the rows are images themselves.
    """

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
    """Convert any source of an image to a record, also an undecoded Hugging Face cell ``{"bytes": ..., "path": ...}``.

    Raises:
        ImageError: The source is of no known kind or cannot be decoded.
        InputError: A tensor is not `[3, H, W]` or `[1, H, W]` and finite.
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
    """Images of a loaded Hugging Face data set, or of any iterable of rows or images.

    Args:
        dataset: A ``datasets.Dataset`` or ``IterableDataset``, or rows (mappings) or images of `ImageSource`'s kinds.
        column: The column of images. By default the only one of type ``datasets.Image``, or, without such types, the
            first row's only image.

    Returns:
        An iterable of records; usable as ``CalibrationCrops(images=...)`` where the data set has a length.

    Raises:
        DatasetError: The column does not exist, or none was named and there is not exactly one candidate.
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
    """The requested column, or else the only candidate.

    Raises:
        DatasetError: It does not exist, or there is not exactly one candidate; the message lists all columns.
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
