"""Output files, which appear whole or not at all, and output folders."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from harmoq_ao.common.errors import OutputError

_LONGEST = 50  # characters of the target's name in the temporary name; file systems allow 255 bytes


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context manager for a binary file that replaces ``path`` at the end of the block, unless the block raises.

    It is written beside its target, as ``.NAME.RANDOM.tmp``, flushed to the disk and renamed: at any time, even after a
    crash, ``path`` holds either its former content or all of the new. Only a killed process leaves the temporary file.

    Raises:
        OutputError: On any ``OSError``; the former content of ``path`` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:_LONGEST]}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path} could not be written",
            found=f"{type(error).__name__}: {error.strerror or error}",
            expected="an existing folder, permission to write there, and enough space",
            remedy="free some space or choose another place; an existing file of this name is unchanged",
        ) from error
    finally:
        # After success the rename has consumed it; after any exception, KeyboardInterrupt too, nothing partial stays.
        with suppress(OSError):
            temporary.unlink()


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents, unless it exists, and return it.

    Raises:
        OutputError: It cannot be created, or a file is in its place.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path that no system accepts
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(f"{path} cannot be created", found=found, remedy="choose another folder") from error
    return path
