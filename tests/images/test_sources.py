"""Images by one name: folders, patterns, lists and data sets give the same pictures, and errors say what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from harmoq_ao.common.errors import DatasetError, ImageError
from harmoq_ao.images import CalibrationCrops, EncodedImage, find_images, image_files, list_images, split_photographs
from harmoq_ao.images.sources import LIST_SUFFIXES
from tests.pictures import png_bytes


def encoded(index: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 4), np.uint8)
    return png_bytes(Image.fromarray(pixels).convert(mode))


def photographs(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"frame{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(encoded(index))
    return paths


def parquet(path: Path, contents: Sequence[bytes | None]) -> Path:
    """Images inside the file, as the hub has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [data if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(contents)]
    rows = datasets.Dataset.from_dict({"picture": cells, "label": list(range(len(cells)))})
    rows.cast_column("picture", datasets.Image()).to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and nothing left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_as_before(tmp_path: Path) -> None:
    photographs(tmp_path / "a" / "b", 12)
    photographs(tmp_path / "a")
    assert find_images(tmp_path / "a", learned=1) == list_images(tmp_path / "a", recursive=True)
    assert image_files([tmp_path / "a"]) == list_images(tmp_path / "a")


def test_patterns_in_the_order_of_frames(tmp_path: Path) -> None:
    paths = photographs(tmp_path, 12)
    (tmp_path / "notes.txt").write_text("x")
    assert image_files(str(tmp_path / "*")) == paths
    assert find_images(str(tmp_path / "frame1?.png"), learned=1) == paths[10:]
    assert image_files([tmp_path / "frame[01].png", paths[5]]) == [*paths[:2], paths[5]]
    assert image_files(str(tmp_path.parent / "**" / tmp_path.name / "*.png")) == paths
    (tmp_path / "frame3.bin").write_bytes(b"x")
    assert image_files(str(tmp_path / "*.bin")) == [tmp_path / "frame3.bin"]


def test_a_file_with_the_letters_of_a_pattern_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "a[1].png"
    path.write_bytes(encoded(0))
    assert image_files(str(path)) == [path]


@pytest.mark.parametrize("suffix", LIST_SUFFIXES)
def test_lists_of_paths_keep_their_order(tmp_path: Path, suffix: str) -> None:
    paths = photographs(tmp_path / "in")
    given = tmp_path / f"list{suffix}"
    given.write_text(f"\ufeff# chosen by hand\n{paths[2]}\n\n in/frame0.png \r\nin/frame1.png", encoding="utf-8")
    assert image_files(given) == [paths[2], paths[0], paths[1]]
    assert find_images(str(given), learned=64) == image_files(str(given))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty. Found: 0 bytes. Expected: a list of paths"),
        (b"# a\n\n", r"names no image. Found: only empty lines"),
        (b"a.png\nlost.png\n", r"Line 2 of .*list.txt names no file. Found: .*lost.png"),
        (b"a.png\n\xff\xfe\x00", r"cannot be read as a list of images. Found: UnicodeDecodeError"),
        (b"a.png\n" + b"x" * 9000, r"Line 2 of .* names no file"),
        (b"a\0b.png", r"Line 1 of .* names no file"),
        (b".", r"Line 1 of .* names no file"),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        image_files(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere does not exist. Expected: a folder, an image, a pattern"),
        ("*.png", "No image matches .*quote it"),
        ("a\0b", "does not exist"),
        ("x" * 5000, "does not exist"),
        ("", "There is no image in|does not exist"),
    ],
)
def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for find in (image_files, lambda s: find_images(s, learned=1)):
        with pytest.raises(DatasetError, match=message):
            find(source)


def test_files_are_needed_where_results_need_names() -> None:
    with pytest.raises(DatasetError, match="hf:some/thing is a data set, where files are needed"):
        image_files(["hf:some/thing"])
    with pytest.raises(DatasetError, match="no image in an empty list"):
        image_files([])


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "folder", "hf:file", "hf:folder", "split", "saved"])
def test_parquet_gives_the_pictures_that_files_give(tmp_path: Path, form: str) -> None:
    path = parquet(tmp_path / "set" / "data.parquet", [encoded(index) for index in range(3)])
    names = {"file": str(path), "folder": str(path.parent), "split": f"hf:{path.parent}:train"}
    names |= {f"hf:{key}": f"hf:{names[key]}" for key in ("file", "folder")}
    if form == "saved":
        datasets.Dataset.from_parquet(str(path)).save_to_disk(tmp_path / "saved")
    found = find_images(names.get(form, f"hf:{tmp_path / 'saved'}"), learned=8)
    assert [image.data for image in found] == [encoded(index) for index in range(3)]
    files = photographs(tmp_path / "files")
    ours, theirs = (CalibrationCrops(images, size=8, count=5) for images in (found, files))
    assert all(bool((a == b).all()) for a, b in zip(ours, theirs, strict=True))


def test_only_as_many_rows_are_read_as_calibration_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(10_000):
            read.append(index)
            yield {"image": {"bytes": encoded(index), "path": None}}

    stream = datasets.IterableDataset.from_generator(rows, features=datasets.Features({"image": datasets.Image()}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDatasetDict({"train": stream}))
    found = find_images("hf:someone/photographs", learned=20)
    learned, held_out = split_photographs(found)
    assert len(learned) >= 20
    assert held_out
    assert not {image.row for image in learned} & {image.row for image in held_out}
    assert learned == sorted(learned)
    assert len(read) <= len(found) + 1  # a stream looks one row ahead


@pytest.mark.parametrize("crops", [1, 2, 8, 9, 10, 64, 100, 1000])
def test_enough_remains_after_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crops: int) -> None:
    monkeypatch.setattr(
        "harmoq_ao.images.sources.dataset_images",
        lambda _, most, __: [EncodedImage(index, "", b"") for index in range(most)],
    )
    learned, held_out = split_photographs(find_images("hf:x", learned=crops))
    assert crops <= len(learned) <= crops + 1
    assert held_out


def test_folders_of_images_as_a_data_set_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 3)):
        photographs(tmp_path / "set" / split, count)
    assert len(find_images(f"hf:{tmp_path / 'set'}", learned=9)) == 2
    assert len(find_images(f"hf:{tmp_path / 'set'}:test", learned=9)) == 3
    with pytest.raises(DatasetError, match=r"has no split val. Found: splits t\w+, t\w+. .*hf:"):
        find_images(f"hf:{tmp_path / 'set'}:val", learned=9)


def test_gray_alpha_and_sixteen_bits_are_read_as_from_files(tmp_path: Path) -> None:
    deep = png_bytes(Image.fromarray(np.arange(0, 60000, 100, np.uint16).reshape(20, 30)))
    path = parquet(tmp_path / "a.parquet", [encoded(0, "L"), encoded(1, "RGBA"), deep])
    gray, alpha, sixteen = (image.load() for image in find_images(path, learned=3))
    assert gray.grayscale
    assert alpha.alpha is not None
    assert sixteen.bit_depth == 16


CELLS = [[{"bytes": encoded(index), "path": None}] for index in range(2)]


@pytest.mark.parametrize(
    ("columns", "column", "expected"),
    [
        ({"img": CELLS[0], "raw": [encoded(1)]}, None, 0),
        ({"img": CELLS[0], "raw": [encoded(1)]}, "raw", 1),
        ({"a": CELLS[0], "b": CELLS[1]}, "b", 1),
        ({"a": CELLS[0], "b": CELLS[1]}, "c", r"no such column. Found: columns a, b. Expected: 'c'"),
        ({"a": CELLS[0], "b": CELLS[1]}, None, "image columns: a, b"),
        ({"text": ["a"], "label": [1]}, None, "image columns: none; all columns: text, label"),
        ({"text": ["a"], "label": [1]}, "text", r"There is no image in row 0 of .* a value of type str"),
    ],
)
def test_columns_of_parquet_of_another_writer(
    tmp_path: Path, columns: dict[str, list[Any]], column: str | None, expected: int | str
) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    if isinstance(expected, int):
        assert find_images(path, learned=1, column=column)[0].data == encoded(expected)
        return
    with pytest.raises(DatasetError, match=expected):
        find_images(path, learned=1, column=column)


def test_broken_and_missing_pictures_are_named_by_their_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [encoded(0), b"no image"])
    with pytest.raises(ImageError, match=r"row 1 of hf:.*a.parquet is not an image"):
        list(CalibrationCrops(find_images(path, learned=2), size=8, count=2))
    path = parquet(tmp_path / "b.parquet", [None])
    with pytest.raises(DatasetError, match=r"There is no image in row 0 of .* Found: nothing"):
        find_images(path, learned=2)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("a.parquet", b"", r"cannot be read|no data set"),
        ("a.parquet", b"PAR1" + b"junk" * 50 + b"PAR1", r"cannot be read|no data set"),
        ("hf:a.bin", b"x", "is no data set"),
        ("hf:", None, "There is no data set"),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, source: str, content: bytes | None, message: str) -> None:
    prefix, path = source[: source.find(":") + 1], tmp_path / source.rpartition(":")[2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        find_images(f"{prefix}{path}", learned=2)


def test_a_data_set_made_by_a_script(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    mark = tmp_path / "executed"
    (tmp_path / "old" / "old.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(DatasetError, match=r"made by a script, which is not run.*refs/convert/parquet"):
        find_images(f"hf:{tmp_path / 'old'}", learned=2)
    assert not mark.exists()


def test_the_hub_out_of_reach() -> None:
    with pytest.raises(DatasetError, match=r"hub cannot be reached for nobody/nothing.*local folder"):
        find_images("hf:nobody/nothing:train", learned=2)


@pytest.mark.parametrize("name", ["", ":train", "a:b:c", "#x", "a@", "a\0b", "../..//etc", "x" * 3000])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(DatasetError):
        find_images(f"hf:{name}", learned=2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("who/what", ("who/what", None, None, None)),
        ("what:train", ("what", None, None, "train")),
        ("who/what#x2@refs/convert/parquet:validation", ("who/what", "x2", "refs/convert/parquet", "validation")),
    ],
)
def test_parts_of_a_name(
    given: str, expected: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    rows = datasets.Dataset.from_parquet(str(parquet(tmp_path / "a.parquet", [encoded(0)])))

    def load(name: str, config: str | None, *, streaming: bool, revision: str | None) -> Any:
        assert streaming
        asked.append((name, config, revision))
        return datasets.DatasetDict({expected[3] or "train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(find_images(f"hf:{given}", learned=2)) == 1
    assert asked == [expected[:3]]


def test_folders_need_no_data_set_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = photographs(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert find_images(tmp_path, learned=2) == paths
