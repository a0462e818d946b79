"""Pairing references with low-resolution images, in the layouts and by the names that people use."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from harmoq_ao.common.errors import ConfigError, DatasetError, ImageError
from harmoq_ao.images import load_pairs


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


LAYOUTS = {
    "EDSR": ("HR/{}.png", "LR_bicubic/X2/{}x2.png"),
    "BasicSR": ("GTmod12/{}.png", "LRbicx2/{}.png"),
    "SelfExSR": ("image_SRF_2/{}_SRF_2_HR.png", "image_SRF_2/{}_SRF_2_LR.png"),
    "DIV2K": ("DIV2K_valid_HR/{}.png", "DIV2K_valid_LR_bicubic/X2/{}x2.png"),
    "RCAN": ("HR/x2/{}_HR_x2.png", "LR/x2/{}_LRBI_x2.png"),
    "RealSR": ("HR/{}_HR.png", "LR/{}_LR2.png"),
    "ESRGAN": ("HR/{}.png", "LR/{}_bicLRx2.png"),
    "capital": ("HR/{}.png", "LR_bicubic/X2/{}X2.png"),
    "other suffix": ("hr/{}.png", "lr/{}.bmp"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_published_benchmarks(tmp_path: Path, layout: str) -> None:
    high, low = LAYOUTS[layout]
    for name in ("baby", "img_10", "img_2"):
        write(tmp_path / high.format(name), 17, 12)
        write(tmp_path / low.format(name))
    if layout == "SelfExSR":  # other methods' results lie beside the images
        write(tmp_path / "image_SRF_2" / "baby_SRF_2_bicubic.png", 16, 12)
    pairs = load_pairs(tmp_path, None, 2)
    assert [pair.name for pair in pairs] == ["baby", "img_2", "img_10"]
    assert pairs[1].hr == tmp_path / high.format("img_2")
    assert pairs[1].lr == tmp_path / low.format("img_2")


def test_sizes_that_matlab_rounds_up(tmp_path: Path) -> None:
    write(tmp_path / "HR" / "a.png", 17, 11)
    for width, height in ((9, 6), (8, 5), (9, 5)):
        write(tmp_path / "LR" / "a.png", width, height)
        assert len(load_pairs(tmp_path, None, 2)) == 1
    write(tmp_path / "LR" / "a.png", 9, 7)
    with pytest.raises(DatasetError, match="Sizes do not match"):
        load_pairs(tmp_path, None, 2)


def test_a_pattern_of_low_resolution_names(tmp_path: Path) -> None:
    for name in ("a", "a-1"):
        write(tmp_path / "HR" / f"{name}.png")
        write(tmp_path / "LR" / f"small2-{name}_(q90).png", 4, 3)
    with pytest.raises(DatasetError, match=r"do not pair up.*--lr-name"):
        load_pairs(tmp_path, None, 2)
    pairs = load_pairs(tmp_path, None, 2, "small{scale}-{name}_(q90)")
    assert [(pair.name, pair.lr.name) for pair in pairs] == [
        ("a", "small2-a_(q90).png"),
        ("a-1", "small2-a-1_(q90).png"),
    ]
    for pattern in ("", "x{scale}", "{name}{name}", "{name}{x}", "{name", "a/{name}", "{name}{}", "{name!r}"):
        with pytest.raises(ConfigError, match="pattern of low-resolution names"):
            load_pairs(tmp_path, None, 2, pattern)


def test_one_folder_needs_names_that_tell_them_apart(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    write(tmp_path / "b.png")
    with pytest.raises(DatasetError, match="do not pair up"):
        load_pairs(tmp_path, tmp_path, 2)
    write(tmp_path / "c_HR_x2.png")
    write(tmp_path / "c_LRBI_x2.png", 4, 3)
    assert [pair.name for pair in load_pairs(tmp_path, tmp_path, 2)] == ["c"]


def test_several_sets_in_one_root_are_not_guessed(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        write(tmp_path / f"DIV2K_{part}_HR" / "a.png")
        write(tmp_path / f"DIV2K_{part}_LR_bicubic" / "X2" / "ax2.png", 4, 3)
    with pytest.raises(DatasetError, match=r"not a benchmark folder.*one by one"):
        load_pairs(tmp_path, None, 2)
