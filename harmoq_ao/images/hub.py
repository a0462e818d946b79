"""Hugging Face data sets, from the hub or a folder: their first images, streamed, so that nothing else is fetched."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from harmoq_ao.common.errors import DatasetError, HarmoqError
from harmoq_ao.common.files import NOTHING, check_file, found_at
from harmoq_ao.common.progress import track
from harmoq_ao.images.columns import ImageColumn, as_record, choose_column, from_hf_dataset, image_features
from harmoq_ao.images.reading import EncodedImage

_NAME = re.compile(r"(?P<name>[^#@:]+)(?:#(?P<config>[^@:]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>[\w.-]+))?")
_MAX_IMAGE_BYTES = 1 << 30
_CONVERTED = "refs/convert/parquet"
_OTHER_WAYS = "save its images to a folder and pass that"


@dataclass(frozen=True)
class DatasetName:
    """The parts of ``NAME[#CONFIG][@REVISION][:SPLIT]``; text that exists as a path is a name as a whole."""

    text: str
    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """Parse a name.

        Raises:
            DatasetError: The form is another.
        """
        if os.path.exists(text):
            return cls(text, text)
        path, _, split = text.rpartition(":")
        if path and os.path.exists(path):
            return cls(text, path, split=split)
        match = _NAME.fullmatch(text)
        if match is None:
            raise DatasetError(
                "The name of a data set cannot be parsed",
                found=f"hf:{text}"[:200],
                expected="hf:NAME, hf:NAME:SPLIT, or hf:NAME#CONFIG@REVISION:SPLIT",
            )
        return cls(text, **match.groupdict())


def dataset_images(text: str, most: int, column: str | None = None) -> list[EncodedImage]:
    """The images of a data set's first rows.

    Args:
        text: See `DatasetName`; without a split it is ``train``, or the only one.
        most: Maximum number of rows; no further one is fetched.
        column: The column of images; by default the only one.

    Raises:
        DatasetError: The data set does not exist, cannot be reached or read, has no such split or column, needs a
            script, or is empty.
    """
    name = DatasetName.parse(text)
    with _typed_errors(name):
        rows = _without_decoding(_split(_opened(name), name), column)
        if rows.column is None:
            raise DatasetError("The data set's rows have no columns", expected="a column of images")
        images = [
            _encoded(row.get(rows.column), index, name)
            for index, row in enumerate(track(islice(rows.rows, most), "Reading the data set", total=most))
        ]
    if not images:
        raise DatasetError(f"The data set {text} is empty", found="0 rows", expected="at least one image")
    return images


def _opened(name: DatasetName) -> Any:
    import datasets

    path = Path(name.name)
    options: dict[str, Any] = {"streaming": True, "revision": name.revision}
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DatasetError(f"{path} is no data set", found="a file", expected="a folder, or a .parquet file")
        return datasets.load_dataset("parquet", data_files=str(path), **options)
    if path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(str(path))  # maps its files, reads nothing yet
    return datasets.load_dataset(name.name, name.config, **options)


def _split(opened: Any, name: DatasetName) -> Any:
    if not isinstance(opened, Mapping):
        if name.split is not None:
            raise DatasetError(f"{name.name} has no splits", found=name.split, expected="its name alone")
        return opened
    wanted = name.split or ("train" if "train" in opened or len(opened) != 1 else next(iter(opened)))
    if wanted not in opened:
        raise DatasetError(
            f"The data set {name.name} has no split {wanted}",
            found=f"splits {', '.join(opened)}",
            remedy=f"name one of them: hf:{name.name}:{next(iter(opened), 'SPLIT')}",
        )
    return opened[wanted]


def _without_decoding(dataset: Any, column: str | None) -> ImageColumn:
    """The column of images as encoded files, so that one is decoded at a time, later, and 16 bits are kept."""
    import datasets

    features = getattr(dataset, "features", None)
    if not features:  # formats that name their columns row by row
        return from_hf_dataset(dataset, column)
    chosen = choose_column(column, list(features), image_features(features))
    if isinstance(features[chosen], datasets.Image):
        dataset = dataset.cast_column(chosen, datasets.Image(decode=False))
    return ImageColumn(dataset.select_columns([chosen]), chosen)


def _encoded(cell: Any, row: int, name: DatasetName) -> EncodedImage:
    where = f"row {row} of hf:{name.text}"
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if data is None and isinstance(cell, Mapping) and isinstance(cell.get("path"), str):
        data = _read(cell["path"])
    if isinstance(data, bytes):
        return EncodedImage(row, where, data)
    if data is None or isinstance(data, str | int | float | list):
        raise DatasetError(
            f"There is no image in {where}",
            found="nothing" if data is None else f"a value of type {type(data).__name__}",
            expected="an encoded image",
            remedy="choose another column or split, or leave such rows out of the data set",
        )
    return _reencoded(data, row, where)


def _reencoded(data: Any, row: int, where: str) -> EncodedImage:
    """Encode, without loss, an image that the data set's format has decoded already."""
    buffer = io.BytesIO()
    Image.fromarray(as_record(data).to_uint8()).save(buffer, "PNG", compress_level=1)
    return EncodedImage(row, where, buffer.getvalue())


def _read(path: str) -> bytes:
    """The bytes of a local file, or of one next to the data set (``hf://``, ``zip://...``)."""
    import fsspec

    if found_at(path) != NOTHING:  # otherwise it is remote, or in an archive
        check_file(path, DatasetError, "an image file", _MAX_IMAGE_BYTES)
    with fsspec.open(path, "rb") as file:
        data: bytes = file.read(_MAX_IMAGE_BYTES)
    return data


@contextmanager
def _typed_errors(name: DatasetName) -> Iterator[None]:
    """Context manager that turns errors of the library, its formats and the network into a `DatasetError`."""
    try:
        yield
    except HarmoqError:
        raise
    except Exception as error:
        raise _explained(name, error) from error


def _explained(name: DatasetName, error: Exception) -> DatasetError:
    text, kind = " ".join(str(error).split())[:300], type(error).__name__
    if "scripts are no longer supported" in text or "trust_remote_code" in text:
        return DatasetError(
            f"The data set {name.name} is made by a script, which is not run",
            found=text,
            expected="data files: Parquet, images, ...",
            remedy=f"try the hub's conversion, hf:{name.name}@{_CONVERTED}, or {_OTHER_WAYS}",
        )
    if kind in ("DatasetNotFoundError", "EmptyDatasetError", "RepositoryNotFoundError", "DataFilesNotFoundError"):
        return DatasetError(
            f"There is no data set {name.name}",
            found=text,
            expected="a name on the Hugging Face hub, or a folder with data files",
            remedy="check the name; for a private or gated one log in first: hf auth login",
        )
    if isinstance(error, ConnectionError | TimeoutError) or _of_network(error):
        return DatasetError(
            f"The Hugging Face hub cannot be reached for {name.name}",
            found=f"{kind}: {text}",
            remedy=f"check the connection and that HF_HUB_OFFLINE is not set, or pass a local folder; or {_OTHER_WAYS}",
        )
    if "onfig name is missing" in text or "BuilderConfig" in text:
        return DatasetError(
            f"The data set {name.name} has several configurations",
            found=text,
            remedy=f"name one of them: hf:{name.name}#CONFIG",
        )
    return DatasetError(
        f"The data set {name.text} cannot be read",
        found=f"{kind}: {text}",
        expected="rows of images",
        remedy=_OTHER_WAYS,
    )


def _of_network(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
