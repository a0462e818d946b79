"""Putting results on a disk: folders, and files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from harmoq_ao.common.errors import OutputError

_LONGEST = 50  # characters of the target's name in the temporary one; file systems take 255 bytes


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends, and vanishes if the block raises.

    It is written beside its target, as ``.NAME.RANDOM.tmp``, flushed to the disk and renamed: at any time, also after a
    crash, there is either what was there before or all that was written. Only a killed process leaves the temporary
    file behind.

    Raises:
        OutputError: For every ``OSError`` on the way; what was at ``path`` before is untouched.
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
            remedy="free some space or choose another place; an older file of this name was left as it was",
        ) from error
    finally:
        # The rename has consumed it on success; on any exception, KeyboardInterrupt too, nothing half-written stays.
        with suppress(OSError):
            temporary.unlink()


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder with all above it, unless it is there, and return it.

    Raises:
        OutputError: It cannot be created, or a file is in its place.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path that no system takes
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(f"{path} cannot be created", found=found, remedy="choose another folder") from error
    return path
