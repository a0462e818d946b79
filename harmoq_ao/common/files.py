"""What lies at a path, and whether it may be opened: regular files of bounded size only.

Opening a pipe or a terminal waits for ever, and a sparse file of 40 GB fills the memory. Every error of the system
(no permission, a name that is too long) is an answer here, never an exception.
"""

from __future__ import annotations

import os
import stat
from typing import TypeVar

from harmoq_ao.common.errors import HarmoqError

AnyPath = str | os.PathLike[str]
Raised = TypeVar("Raised", bound=HarmoqError)

NOTHING = "no such file or folder"
FILE = "a file"
FOLDER = "a folder"
_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def found_at(path: AnyPath) -> str:
    """What lies at a path, in words: `NOTHING`, `FILE`, `FOLDER`, a device, or why the system does not say."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if os.path.islink(path) else NOTHING
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        return reason_of(error)
    if stat.S_ISREG(mode):
        return FILE
    return FOLDER if stat.S_ISDIR(mode) else _SPECIAL.get(stat.S_IFMT(mode), "no regular file")


def reason_of(error: Exception) -> str:
    """The system's words for an error, without number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def check_file(path: AnyPath, raised: type[Raised], expected: str, most: int) -> int:
    """The size of a file that is about to be read.

    Args:
        path: The file.
        raised: Type of the error.
        expected: What the file should be, in the error: "an image file".
        most: Largest size in bytes.

    Raises:
        HarmoqError: Of the type ``raised``: there is no regular file, it may not be read, is empty, or is larger.
    """
    found = found_at(path)
    if found != FILE:
        what = f"{path} does not exist" if found == NOTHING else f"{path} is not a file"
        raise raised(what, found=found, expected=expected, remedy="check the path")
    if not os.access(path, os.R_OK):
        raise raised(f"{path} may not be read", found="permission denied", expected=expected, remedy="change its mode")
    size = os.stat(path).st_size
    if not 0 < size <= most:
        what = "is empty" if size == 0 else "is too large"
        allowed = "" if size == 0 else f" of at most {most:,} bytes"
        raise raised(
            f"{path} {what}",
            found=f"{size:,} bytes",
            expected=f"{expected}{allowed}",
            remedy="download or copy the file again",
        )
    return size
