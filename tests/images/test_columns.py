"""Images from Python objects and from columns of data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harmoq_ao.common.errors import DatasetError, ImageError, InputError
from harmoq_ao.images import CalibrationCrops, ImageRecord, as_record, from_hf_dataset, load_image
from tests.pictures import codes, png_bytes


def test_every_kind_of_source_gives_the_same_record(tmp_path: Path) -> None:
    array = codes(3, size=(6, 5))
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).movedim(-1, 0) / 255
    cell = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    sources = (tmp_path / "a.png", str(tmp_path / "a.png"), array, tensor, Image.fromarray(array), cell)
    for source in (*sources, {"path": str(tmp_path / "a.png"), "bytes": None}, load_image(tmp_path / "a.png")):
        np.testing.assert_array_equal(as_record(source).to_uint8(), array)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (7, ImageError, "This is not an image. Found: int"),
        ({"bytes": None, "path": None}, ImageError, "A cell holds no image"),
        ({"bytes": b"text"}, ImageError, "A cell's image is not an image"),
        ({"bytes": 7}, ImageError, "A cell holds no image. Found: int"),
        (torch.zeros(1, 3, 4, 4), InputError, "wrong rank"),
        (torch.full((3, 4, 4), float("nan")), InputError, "48 NaN or infinite"),
    ],
)
def test_bad_sources_are_named(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        as_record(source)
    assert message in str(caught.value)


def test_rows_and_images_without_a_data_set_library() -> None:
    arrays = [codes(3, size=(6, 5)) for index in range(3)]
    rows = [{"label": index, "photo": Image.fromarray(array)} for index, array in enumerate(arrays)]
    for column in (None, "photo"):
        records = list(from_hf_dataset(rows, column))
        assert all(isinstance(record, ImageRecord) for record in records)
        for record, array in zip(records, arrays, strict=True):
            np.testing.assert_array_equal(record.to_uint8(), array)
    np.testing.assert_array_equal(from_hf_dataset(arrays)[1].to_uint8(), arrays[1])
    assert len(list(CalibrationCrops(from_hf_dataset(rows), 4, 7))) == 7


class Stream:
    """Rows that can only be iterated, as a streaming data set."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"image": codes(3, size=(4, 4))} for index in range(2))


def test_stream_can_be_iterated_again() -> None:
    images = from_hf_dataset(Stream())
    assert len(list(images)) == len(list(images)) == 2
    with pytest.raises(TypeError):
        len(images)


def test_hugging_face_data_set() -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    arrays = [codes(3, size=(6, 5)) for index in range(3)]
    buffers = [{"bytes": png_bytes(Image.fromarray(array)), "path": None} for array in arrays]
    for decode in (True, False):
        features = datasets.Features({"name": datasets.Value("string"), "hr": datasets.Image(decode=decode)})
        data = datasets.Dataset.from_dict({"name": ["a", "b", "c"], "hr": buffers}, features=features)
        images = from_hf_dataset(data)
        assert (images.column, len(images)) == ("hr", 3)
        for record, array in zip(images, arrays, strict=True):
            np.testing.assert_array_equal(record.to_uint8(), array)
        assert len(list(CalibrationCrops(images, 4, 5))) == 5
    with pytest.raises(DatasetError, match=r"no such column. Found: columns name, hr. Expected: 'photo' among them"):
        from_hf_dataset(data, "photo")
    with pytest.raises(DatasetError, match=r"not clear. Found: image columns: none; all columns: name"):
        from_hf_dataset(data.remove_columns("hr"))


def test_bad_rows_are_named() -> None:
    image = codes(3, size=(4, 4))
    with pytest.raises(DatasetError, match=r"Found: image columns: a, b; all columns: a, b. Expected: exactly one"):
        from_hf_dataset([{"a": image, "b": image}])
    with pytest.raises(DatasetError, match=r"The data set is empty. Found: 0 rows"):
        from_hf_dataset([])
    images = from_hf_dataset([{"a": image}, {"b": 1}])
    with pytest.raises(DatasetError, match=r"A row has no image column. Found: columns b. Expected: a column 'a'"):
        list(images)
