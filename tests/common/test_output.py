"""Files appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from harmoq_ao.common import output
from harmoq_ao.common.errors import OutputError
from harmoq_ao.common.output import atomic_write, make_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def test_a_file_is_replaced_or_left(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, b"one")
    write(path, b"two")
    assert contents(tmp_path) == {"a.bin": b"two"}


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("step", ["open", "fsync", "replace", "block"])
def test_an_interrupted_write_leaves_what_was_there(
    step: str, there: bool, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    if there:
        path.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    def attempt() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            if step == "block":
                raise failure

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(output, "open", fail, raising=False)
        elif step != "block":
            patch.setattr(os, step, fail)
        with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
            attempt()
    if isinstance(failure, OSError):
        assert "No space left" in str(caught.value)
        assert "is unchanged" in str(caught.value)
    assert contents(tmp_path) == ({"a.bin": b"old"} if there else {})


def test_an_interrupt_after_the_rename_leaves_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def late(*arguments: Any) -> None:
        replace(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.bin", b"new")
    assert contents(tmp_path) == {"a.bin": b"new"}


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    def attempt(error: Exception) -> None:
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise error

    for error in (ValueError("a bug"), OutputError("said already")):
        with pytest.raises(type(error)) as caught:
            attempt(error)
        assert caught.value is error
    assert contents(tmp_path) == {}


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_others_may_read_it_as_any_new_file(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", b"x")
    (tmp_path / "usual").write_bytes(b"x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["n" * 250, "\u00fc" * 120])
def test_long_names_are_names(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, b"x")
    assert contents(tmp_path) == {name: b"x"}


def test_folders_are_made_or_the_error_says_why_not(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(str(tmp_path / "a")).is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 400), tmp_path / "\0"):
        with pytest.raises(OutputError, match="cannot be created"):
            make_folder(path)
