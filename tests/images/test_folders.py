"""Listing folders: what is taken, in which order, and what is said of the rest."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from PIL import Image

from harmoq_ao.common.errors import DatasetError
from harmoq_ao.images import Listing, list_images


def write(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


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
    with pytest.raises(
        DatasetError,
        match=r"nowhere does not exist. Found: no such file or folder. Expected: a folder of images or an image file",
    ):
        list_images(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"no image in an empty list"):
        list_images([])


def reasons(listing: Listing, folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): reason for path, reason in listing.skipped}


@pytest.mark.parametrize("recursive", [True, False])
def test_what_is_skipped_is_named_with_the_reason(tmp_path: Path, recursive: bool) -> None:
    for name in ("a.png", "b.JFIF", "c.tga", "sub/d.png"):
        write(tmp_path / "e.png").rename(tmp_path / "e")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "e").rename(tmp_path / name)
    for name in ("notes.txt", "Thumbs.db", "movie.mp4", "raw.NEF", ".DS_Store", "._a.png"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to("nowhere")
    (tmp_path / "up").symlink_to(tmp_path)
    listing = Listing()
    listing.add_folder(tmp_path, recursive)
    taken = [file.below.as_posix() for file in listing.files]
    assert taken == ["a.png", "b.JFIF", "c.tga", *(["sub/d.png"] if recursive else [])]
    found = reasons(listing, tmp_path)
    assert found.pop("sub", None) == (None if recursive else "a subfolder")
    assert found == {
        "notes.txt": "no image by its suffix",
        "Thumbs.db": "no image by its suffix",
        "movie.mp4": "a video: extract its frames first",
        "raw.NEF": "a raw photograph",
        "pipe.png": "a pipe",
        "lost.png": "a link to nothing",
        "up": "a link to a folder" if recursive else "a subfolder",
    }


def test_formats_that_this_pillow_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "b.exr").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"Found: 0 files with a known suffix; of other kinds 2 \(.exr, .heic\)"):
        list_images(tmp_path)


def test_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png")
    write(tmp_path / "closed" / "b.png")
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "closed":  # the superuser may read everything
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = Listing()
    listing.add_folder(tmp_path, recursive=True)
    assert [file.path.name for file in listing.files] == ["a.png"]
    assert reasons(listing, tmp_path) == {"closed": "Permission denied"}
    with pytest.raises(DatasetError, match=r"closed cannot be listed. Found: Permission denied"):
        list_images(tmp_path / "closed")
