"""A folder of built files that every process of a user shares, and that none of them can trust blindly."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harmoq_ao.common.errors import OutputError
from harmoq_ao.common.output import atomic_write

VARIABLE = "HARMOQ_CACHE"
"""Environment variable: the folder to use in place of ``~/.cache/harmoq-ao``."""

WAIT = 600.0
"""Seconds to wait for another process that builds the same; then this one builds as well."""

_UNUSED_DAYS = 90
_FAILURE_HOURS = 24


class CacheUnusableError(Exception):
    """The folder cannot be made, or somebody else could have written there; the text is one clause that says so."""


class BuildCache:
    """Files by name, each followed by its SHA-256: one that was cut off or damaged is as good as none.

    Args:
        folder: Where they lie; made with access for its owner only.

    Raises:
        CacheUnusableError: See there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
        except (OSError, ValueError) as error:
            found = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise CacheUnusableError(f"the folder {folder} cannot be made ({found})") from error
        # What lies here is loaded into the process: nobody else but the administrator may have put it there.
        if hasattr(os, "geteuid") and status.st_uid not in (os.geteuid(), 0):
            raise CacheUnusableError(f"the folder {folder} belongs to somebody else")
        if stat.S_IMODE(status.st_mode) & 0o022 and os.name == "posix":
            raise CacheUnusableError(f"the folder {folder} can be written by others")

    def find(self, pattern: str) -> Path | None:
        """The newest whole file whose name fits a pattern with ``*``, else None."""
        try:
            found = sorted(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        except OSError:
            return None  # removed meanwhile
        for path in found:
            if _is_whole(path):
                with suppress(OSError):
                    os.utime(path)  # used: see `_remove_unused`
                return path
        return None

    def keep(self, name: str, file: Path) -> Path:
        """Put a copy of `file` here under `name`, in place of one that is there, and return its path.

        Raises:
            CacheUnusableError: It cannot be written.
        """
        content = file.read_bytes()
        try:
            with atomic_write(self.folder / name) as out:
                out.write(content)
                out.write(hashlib.sha256(content).digest())
        except OutputError as error:
            raise CacheUnusableError(f"the folder {self.folder} cannot be written ({error.found})") from error
        self._remove_unused()
        return self.folder / name

    def remember_failure(self, name: str, reason: str, remedy: str) -> None:
        """Note that building `name` failed, for a day: a compiler takes long to fail, and would in every process."""
        with suppress(OutputError), atomic_write(self.folder / f"{name}.failed") as out:
            out.write(f"{reason}\n{remedy}\n".encode())

    def recent_failure(self, name: str) -> tuple[str, str] | None:
        """Reason and remedy of a failure within the last day, else None."""
        path = self.folder / f"{name}.failed"
        try:
            if time.time() - path.stat().st_mtime > _FAILURE_HOURS * 3600:
                return None
            reason, remedy = path.read_text(errors="replace").splitlines()
        except (OSError, ValueError):
            return None
        return reason, remedy

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Context manager that one process at a time is in, for each `name`; others wait, at most `WAIT` seconds.

        The system takes the lock from a process that dies. Being alone only saves work: where files have no locks, or
        waiting took too long, all may enter.
        """
        descriptor = _locked(self.folder / f"{name}.lock")
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)  # and with it the lock

    def _remove_unused(self) -> None:
        oldest = time.time() - _UNUSED_DAYS * 86400
        for path in self.folder.glob("*"):
            with suppress(OSError):  # another process may remove it too
                if path.is_file() and path.stat().st_mtime < oldest:
                    path.unlink()


def _locked(path: Path) -> int | None:
    """A descriptor to keep open, with the lock where that could be had; None where files have no locks."""
    try:
        import fcntl

        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (ImportError, OSError):
        return None
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # a network file system without locks
            break
    return descriptor


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]
