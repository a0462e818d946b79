"""Output files, which appear whole or not at all, and output folders; both can be checked before the work begins."""

from __future__ import annotations

import atexit
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from harmoq_ao.common.errors import OutputError
from harmoq_ao.common.files import FILE, FOLDER, NOTHING, found_at, reason_of

_LONGEST = 50  # characters of the target's name in the temporary name; file systems allow 255 bytes
_unfinished: set[Path] = set()
"""Temporary files that exist now. A second signal may arrive while the first one's are being removed."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context manager for a binary file that replaces ``path`` at the end of the block, unless the block raises.

    It is written beside its target, as ``.NAME.RANDOM.tmp``, flushed to the disk and renamed: at any time, even after a
    crash, ``path`` holds either its former content or all of the new. Only a killed process leaves the temporary file.

    Raises:
        OutputError: On any ``OSError``, and for a path that no system takes; the former content is untouched.
    """
    path = Path(path)
    if not path.name:
        raise OutputError(f"{path} could not be written", found="no file name", expected="a file name")
    temporary = path.with_name(f".{path.name[:_LONGEST]}.{uuid.uuid4().hex}.tmp")
    _unfinished.add(temporary)
    try:
        with _created(path, temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        # After success the rename has consumed it; after any exception, KeyboardInterrupt too, nothing partial stays.
        _discard(temporary)


def _created(path: Path, temporary: Path) -> BinaryIO:
    try:
        return open(temporary, "xb")
    except ValueError as error:  # a null character; of the block's own ValueErrors nothing is known here
        raise _not_written(path, error) from error


def _not_written(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"{path} could not be written",
        found=f"{type(error).__name__}: {reason_of(error)}",
        expected="an existing folder, permission to write there, and enough space",
        remedy="free some space or choose another place; an existing file of this name is unchanged",
    )


def _discard(temporary: Path) -> None:
    with suppress(OSError, ValueError):
        temporary.unlink()
    _unfinished.discard(temporary)


@atexit.register
def _discard_unfinished() -> None:
    for temporary in list(_unfinished):
        _discard(temporary)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents, unless it exists, and return it.

    Raises:
        OutputError: It cannot be created, or a file is in its place.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path that no system accepts
        raise OutputError(
            f"{path} cannot be created", found=reason_of(error), remedy="choose another folder"
        ) from error
    return path


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be created or replaced at ``path``; to be called before the work begins.

    Raises:
        OutputError: A folder or a device is in its place, its own folder is missing or may not be written to, or the
            name is too long.
    """
    path = Path(path)
    found: str | None = found_at(path)
    if found == NOTHING:
        parent = path.absolute().parent
        found = found_at(parent)
        found = _writable(parent) if found == FOLDER else f"no folder {path.parent}"
    elif found == FILE:
        found = _writable(path.absolute().parent)
    if found is not None:
        raise OutputError(
            f"{path} cannot be written",
            found=found,
            expected="a file name in an existing folder that may be written to",
            remedy="choose another output",
        )


def check_output_folder(path: str | os.PathLike[str]) -> None:
    """Raise unless files can be written to a folder, or it can be created; to be called before the work begins.

    Raises:
        OutputError: A file is in its place or above it, the folder or what it would be created in may not be written
            to, or a name is too long.
    """
    path = Path(path)
    nearest, missing = path.absolute(), []
    while found_at(nearest) == NOTHING and nearest != nearest.parent:
        missing.append(nearest.name)
        nearest = nearest.parent
    found: str | None = found_at(nearest)
    if found == FOLDER:  # below a folder that is missing the system does not look at names
        names = (found_at(nearest / name) for name in missing)
        found = next((said for said in names if said not in (NOTHING, FOLDER, FILE)), None) or _writable(nearest)
    elif missing:
        found = f"{found}, {nearest}"
    if found is not None:
        raise OutputError(
            f"{path} cannot be written to",
            found=found,
            expected="a folder that may be written to, or a path where one can be created",
            remedy="choose another output",
        )


def _writable(folder: Path) -> str | None:
    """None, or why no file can be created in a folder. Asked by creating one: modes do not tell of read-only disks."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{reason_of(error)}, {folder}"
