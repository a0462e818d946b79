"""Folders of images: listed in natural order, with what was skipped and why."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import PIL
from PIL import features

from harmoq_ao.common.errors import DatasetError
from harmoq_ao.common.files import FILE, FOLDER, NOTHING, found_at, reason_of
from harmoq_ao.images.records import PathLike

_PLAIN_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".apng"),
)
_OPTIONAL_SUFFIXES = {"jpg_2000": (".jp2", ".j2k", ".jpx"), "avif": (".avif", ".avifs")}


def _has(feature: str) -> bool:
    """Whether this Pillow has a feature; an old one does not know the name, and warns when it is asked."""
    known = feature in (*features.codecs, *features.modules, *features.features)
    return known and bool(features.check(feature))


IMAGE_SUFFIXES = (*_PLAIN_SUFFIXES, *(s for f, suffixes in _OPTIONAL_SUFFIXES.items() if _has(f) for s in suffixes))
"""Suffixes of the images that folders are searched for, case-insensitive: those that the installed Pillow reads."""

_OTHER_IMAGES = {
    **{s: f"this Pillow ({PIL.__version__}) does not read {f}" for f, all_ in _OPTIONAL_SUFFIXES.items() for s in all_},
    **dict.fromkeys((".heic", ".heif", ".jxl", ".psd", ".xcf", ".exr", ".hdr", ".svg"), "a format that is not read"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), "a raw photograph"),
    **dict.fromkeys((".mp4", ".mkv", ".mov", ".avi", ".webm"), "a video: extract its frames first"),
}
"""Why files that hold pictures are skipped, by suffix."""
PICTURE_SUFFIXES = frozenset({*IMAGE_SUFFIXES, *_OTHER_IMAGES})
"""Suffixes that nobody gives to a folder."""
_NO_IMAGE = "no image by its suffix"


@dataclass(frozen=True)
class Found:
    """An image file.

    Attributes:
        path: The file.
        below: Its path below the folder, pattern or list that named it; its name if it was named itself.
    """

    path: Path
    below: Path


@dataclass
class Listing:
    """The images of several sources, and what else lay there.

    Attributes:
        files: In the order of the sources, those of a folder in natural order.
        skipped: What was not taken, and why. Hidden files are not mentioned.
    """

    files: list[Found] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def add_folder(self, folder: Path, recursive: bool) -> None:
        """Add the images of a folder.

        Raises:
            DatasetError: The folder cannot be listed.
        """
        found = [Found(path, path.relative_to(folder)) for path in self._walk(folder, recursive)]
        self.files += sorted(found, key=lambda file: natural_key(file.below))

    def take(self, path: Path) -> bool:
        """Whether a path is an image by its suffix; what is none is noted."""
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return True
        self.skipped.append((path, _OTHER_IMAGES.get(path.suffix.lower(), _NO_IMAGE)))
        return False

    def leave_out(self, folder: Path) -> None:
        """Drop the files that lie below a folder."""
        inside, kept = os.path.realpath(folder), []
        for file in self.files:
            if os.path.commonpath([inside, _real_folder(file.path.parent)]) == inside:
                self.skipped.append((file.path, "in the folder of the results"))
            else:
                kept.append(file)
        self.files = kept

    def _walk(self, folder: Path, recursive: bool) -> Iterator[Path]:
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            try:
                with os.scandir(current) as listed:
                    entries = [(current / entry.name, found_at(entry)) for entry in listed if entry.name[0] != "."]
            except OSError as error:
                if current == folder:
                    raise DatasetError(
                        f"{folder} cannot be listed", found=reason_of(error), remedy="change its mode"
                    ) from error
                self.skipped.append((current, reason_of(error)))
                continue
            for path, found in entries:
                if found == FILE:
                    if self.take(path):
                        yield path
                elif found != FOLDER:
                    self.skipped.append((path, found))
                elif recursive and not path.is_symlink():
                    waiting.append(path)
                else:
                    self.skipped.append((path, "a link to a folder" if recursive else "a subfolder"))


@lru_cache(1024)
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def list_images(source: PathLike | Iterable[PathLike], recursive: bool = False) -> list[Path]:
    """The image files of a folder, or of files and folders mixed.

    Folders are listed in natural order (``img2`` before ``img10``), without hidden files; files named one by one keep
    their order and may have any suffix.

    Args:
        source: A folder, a file, or several of them.
        recursive: Whether to descend into subfolders.

    Raises:
        DatasetError: A path does not exist or cannot be read, or no image is found.
    """
    sources = [Path(source)] if isinstance(source, str) or not isinstance(source, Iterable) else list(map(Path, source))
    listing = Listing()
    for path in sources:
        add_path(listing, path, recursive)
    return [file.path for file in checked(listing, sources, recursive).files]


def add_path(listing: Listing, path: Path, recursive: bool) -> None:
    """Add a file, whatever its suffix, or the images of a folder.

    Raises:
        DatasetError: There is neither, or it cannot be read.
    """
    found = found_at(path)
    if found == FOLDER:
        listing.add_folder(path, recursive)
    elif found == FILE:
        listing.files.append(Found(path, Path(path.name)))
    else:
        raise DatasetError(
            f"{path} does not exist" if found == NOTHING else f"{path} is no file",
            found=found,
            expected="a folder of images or an image file",
            remedy="check the path",
        )


def checked(listing: Listing, sources: Iterable[object], recursive: bool) -> Listing:
    """The listing, if there is an image in it.

    Raises:
        DatasetError: There is none.
    """
    if not listing.files:
        hint = "" if recursive else ", or list subfolders with recursive"
        others = sorted({path.suffix.lower() or path.name for path, _ in listing.skipped})
        also = f"; of other kinds {len(listing.skipped)} ({', '.join(others[:5])})" if others else ""
        raise DatasetError(
            f"There is no image in {', '.join(map(str, sources)) or 'an empty list'}",
            found=f"0 files with a known suffix{also}",
            expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}",
            remedy=f"check the path{hint}",
        )
    return listing


def natural_key(path: Path) -> list[list[tuple[int, int, str]]]:
    """Sort key that compares numbers in a path as numbers, and letters case-insensitively."""
    return [*map(_folder_key, path.parent.parts), _name_key(path.stem), _name_key(path.suffix)]


def _name_key(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name.lower())
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


_folder_key = lru_cache(1024)(_name_key)
