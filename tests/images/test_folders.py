"""Listing folders and pairing benchmarks, in both usual layouts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from harmoq_ao.common.errors import DatasetError, ImageError
from harmoq_ao.images import list_images, load_pairs


def write(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def benchmark(root: Path, names: tuple[str, ...] = ("baby", "img10", "img2"), suffix: str = "x2") -> Path:
    for name in names:
        write(root / "HR" / f"{name}.png", 17, 12)
        write(root / "LR_bicubic" / "X2" / f"{name}{suffix}.png")
        write(root / "LR_bicubic" / "X3" / f"{name}{suffix and 'x3'}.png", 5, 4)
    return root


def test_natural_order(tmp_path: Path) -> None:
    names = ["a1.png", "a2.PNG", "A3.jpg", "a10.png", "b.tif", "b1.webp"]
    for name in random.Random(0).sample(names, len(names)):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == names
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_subfolders_only_when_asked(tmp_path: Path) -> None:
    top, deep = write(tmp_path / "z.png"), write(tmp_path / "s10" / "a.png")
    middle = write(tmp_path / "s2" / "b.png")
    write(tmp_path / ".cache" / "c.png")
    assert list_images(tmp_path) == [top]
    assert list_images(tmp_path, recursive=True) == [middle, deep, top]


def test_files_keep_their_order_and_suffix(tmp_path: Path) -> None:
    files = [write(tmp_path / "b.png"), write(tmp_path / "a.png")]
    odd = tmp_path / "image.bin"
    odd.write_bytes(files[0].read_bytes())
    assert list_images([*files, odd]) == [*files, odd]
    assert list_images(str(odd)) == [odd]
    assert list_images([tmp_path, odd]) == [*reversed(files), odd]


def test_nothing_to_list(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no image in .* Found: 0 files .* Expected: files ending in .png, .jpg"):
        list_images(tmp_path)
    with pytest.raises(DatasetError, match=r"nowhere does not exist. Expected: a folder of images or an image file"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"no image in an empty list"):
        list_images([])


@pytest.mark.parametrize("suffix", ["x2", ""])
def test_benchmark_root_and_folders(tmp_path: Path, suffix: str) -> None:
    root = benchmark(tmp_path, suffix=suffix)
    pairs = load_pairs(root, None, 2)
    assert [pair.name for pair in pairs] == ["baby", "img2", "img10"]
    assert pairs[1].hr == root / "HR" / "img2.png"
    assert pairs[1].lr == root / "LR_bicubic" / "X2" / f"img2{suffix}.png"
    assert load_pairs(root / "HR", root / "LR_bicubic" / "X2", 2) == pairs
    assert load_pairs(root / "HR", root / "LR_bicubic", 2) == pairs
    assert [pair.scale for pair in load_pairs(root, None, 3)] == [3, 3, 3]
    lr, hr = pairs[0].load()
    assert (lr.size, hr.size) == ((6, 8), (12, 17))


def test_names_that_end_like_a_scale(tmp_path: Path) -> None:
    root = benchmark(tmp_path, names=("a", "ax2"))
    pairs = load_pairs(root, None, 2)
    assert [pair.lr.name for pair in pairs] == ["ax2.png", "ax2x2.png"]


def test_rotated_reference_is_measured_as_displayed(tmp_path: Path) -> None:
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = 6
    (tmp_path / "HR").mkdir()
    Image.new("RGB", (12, 17)).save(tmp_path / "HR" / "a.png", exif=exif)
    write(tmp_path / "LR" / "a.png", 8, 6)
    assert len(load_pairs(tmp_path / "HR", tmp_path / "LR", 2)) == 1


def test_unmatched_files_are_named(tmp_path: Path) -> None:
    root = benchmark(tmp_path)
    (root / "LR_bicubic" / "X2" / "babyx2.png").unlink()
    write(root / "LR_bicubic" / "X2" / "extrax2.png")
    with pytest.raises(DatasetError) as caught:
        load_pairs(root, None, 2)
    assert "without a partner: HR/baby.png, X2/extrax2.png. Expected: for every NAME of HR" in str(caught.value)


def test_many_unmatched_files_are_counted(tmp_path: Path) -> None:
    for index in range(9):
        write(tmp_path / "HR" / f"{index}.png")
    write(tmp_path / "LR" / "0.png", 4, 3)
    with pytest.raises(DatasetError, match=r"HR/5.png and 3 more"):
        load_pairs(tmp_path / "HR", tmp_path / "LR", 2)


@pytest.mark.parametrize("size", [(10, 6), (8, 5), (17, 12)])
def test_wrong_sizes_are_named(tmp_path: Path, size: tuple[int, int]) -> None:
    root = benchmark(tmp_path)
    write(root / "LR_bicubic" / "X2" / "img2x2.png", *size)
    with pytest.raises(DatasetError) as caught:
        load_pairs(root, None, 2)
    assert f"img2 ({size[1]}x{size[0]} for 12x17)" in str(caught.value)
    assert "Sizes do not match at scale 2" in str(caught.value)
    assert "after cropping to a multiple of 2" in str(caught.value)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "bench")
    with pytest.raises(DatasetError, match=r"is not a benchmark folder. Found: no subfolders HR and LR_bicubic"):
        load_pairs(tmp_path, None, 2)
    with pytest.raises(DatasetError, match=r"no images for scale 4. Found: X2, X3. Expected: a folder X4"):
        load_pairs(root, None, 4)
    with pytest.raises(DatasetError, match=r"not an upscaling factor. Found: 0"):
        load_pairs(root, None, 0)
    with pytest.raises(DatasetError, match=r"none does not exist"):
        load_pairs(root / "HR", tmp_path / "none", 2)
    write(root / "HR" / "baby.jpg")
    with pytest.raises(DatasetError, match=r"share a name. Found: baby.jpg and baby.png"):
        load_pairs(root, None, 2)


def test_broken_header_is_named(tmp_path: Path) -> None:
    root = benchmark(tmp_path)
    (root / "HR" / "baby.png").write_bytes(b"text")
    with pytest.raises(ImageError, match=r"The size of .*baby.png cannot be read"):
        load_pairs(root, None, 2)
