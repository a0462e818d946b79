"""What lies at a path is said, whatever it is; only regular files of bounded size are read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from harmoq_ao.common.errors import ImageError
from harmoq_ao.common.files import FILE, FOLDER, NOTHING, check_file, found_at
from harmoq_ao.common.output import check_output_file, check_output_folder
from harmoq_ao.images import load_image

posix = pytest.mark.skipif(os.name != "posix", reason="pipes, sockets and devices are POSIX's")


def check(path: Path | str) -> int:
    return check_file(path, ImageError, "an image file", most=100)


def test_a_file_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert (found_at(path), check(path)) == (FILE, 100)
    path.write_bytes(b"x" * 101)
    with pytest.raises(ImageError, match=r"is too large. Found: 101 bytes. Expected: an image file of at most 100"):
        check(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"is empty. Found: 0 bytes"):
        check(path)


@pytest.mark.parametrize(
    ("name", "found"),
    [("", FOLDER), ("none", NOTHING), ("file/below", NOTHING), ("x" * 300, "File name too long"), ("a\0b", "null")],
)
def test_what_is_no_file(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / name
    assert found in found_at(path)
    with pytest.raises(ImageError, match=f"(?i)Found: .*{found}"):
        check(path)


@posix
def test_special_files_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    os.mkfifo("pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "lost").symlink_to("nothing")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    kinds = {
        "pipe": "a pipe",
        "/dev/zero": "a device",
        "socket": "a socket",
        "loop": "symbolic",
        "lost": "a link to nothing",
    }
    for name, found in kinds.items():
        assert found in found_at(name)
        with pytest.raises(ImageError, match=found):
            load_image(name)
        with pytest.raises(Exception, match=found) as caught:
            check_output_folder(name)
        assert type(caught.value).__name__ == "OutputError"


@posix
def test_a_sparse_file_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(ImageError, match=r"is too large. Found: 42,949,672,960 bytes"):
        load_image(tmp_path / "a.png")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may read everything
    with pytest.raises(ImageError, match=r"may not be read. Found: permission denied"):
        check(tmp_path / "a")


def test_outputs_are_checked_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    check_output_file(tmp_path / "new")
    check_output_file(tmp_path / "file")
    check_output_folder(tmp_path)
    check_output_folder(tmp_path / "a" / "b" / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("", "a folder"),
        ("none/a.html", "no folder"),
        ("file/a.html", "no folder"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
    ],
)
def test_files_that_cannot_be_written(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot be written.*{found}"):
        check_output_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("file", "a file"),
        ("file/below/it", "a file, .*file"),
        ("a/" + "x" * 300, "File name too long"),
        ("a\0b", "null"),
    ],
)
def test_folders_that_cannot_be_written_to(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot be written to.*{found}"):
        check_output_folder(tmp_path / name)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("harmoq_ao.common.output.tempfile.TemporaryFile", refused)  # the superuser may write everywhere
    for check_output, name in ((check_output_file, "a"), (check_output_folder, "."), (check_output_folder, "a/b")):
        with pytest.raises(OSError, match=f"Permission denied, {tmp_path}"):
            check_output(tmp_path / name)
