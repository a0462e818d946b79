"""Images named on a command line: a folder, a file, a glob pattern, a list of paths, or a data set."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from harmoq_ao.common.errors import DatasetError
from harmoq_ao.common.files import FILE, check_file, found_at
from harmoq_ao.images.folders import IMAGE_SUFFIXES, Found, Listing, add_path, checked, natural_key
from harmoq_ao.images.hub import dataset_images
from harmoq_ao.images.photographs import HELD_OUT_SHARE
from harmoq_ao.images.reading import EncodedImage
from harmoq_ao.images.records import PathLike

LIST_SUFFIXES = (".txt", ".lst")
"""Suffixes of text files that list images, one path per line."""
DATASET_PREFIX = "hf:"
"""Prefix of the names of data sets."""
_MAX_LIST_BYTES = 64 << 20
_SHOWN = 200  # characters of a path in a message
_FORMS = "a folder, an image, a pattern such as 'frames/*.png', or a .txt with one path per line"


def find_images(source: PathLike, *, learned: int, column: str | None = None) -> Sequence[Path] | list[EncodedImage]:
    """Photographs to calibrate on.

    Args:
        source: What `image_files` takes (folders with their subfolders); a `.parquet` file, or a folder of them; or
            ``hf:NAME[#CONFIG][@REVISION][:SPLIT]``, a Hugging Face data set by its name on the hub or by its folder.
        learned: Number of pictures needed beside the held-out ones (see `split_photographs`). All files are listed; a
            data set is read from its beginning, no further than needed.
        column: The data set's column of images; by default the only one.

    Returns:
        Paths, or encoded images in memory.

    Raises:
        DatasetError: Nothing was found, a listed file is missing, or the data set cannot be read.
    """
    text = str(source)
    # One more than the held-out share, so that enough remain after the split.
    most = learned + learned // (HELD_OUT_SHARE - 1) + 1
    if text.startswith(DATASET_PREFIX):
        return dataset_images(text.removeprefix(DATASET_PREFIX), most, column)
    if _is_parquet(Path(text)):
        return dataset_images(text, most, column)
    return image_files(source, recursive=True)


def image_files(sources: PathLike | Iterable[PathLike], recursive: bool = False) -> list[Path]:
    """The image files of folders, files, patterns and lists; see `list_sources`.

    Args:
        sources: One of these, or several.
        recursive: Whether to descend into the subfolders of folders.

    Raises:
        DatasetError: As in `list_sources`.
    """
    return [file.path for file in list_sources(sources, recursive).files]


def list_sources(
    sources: PathLike | Iterable[PathLike], recursive: bool = False, results: Path | None = None
) -> Listing:
    """The image files of folders, files, patterns and lists, and what was skipped.

    Folders and patterns (``*``, ``?``, ``[...]``, and ``**`` for any subfolders) are in natural order, lists in their
    own. A pattern matches files with a known suffix, unless it ends in a suffix itself. In a list, empty lines and
    comments (``#``) are skipped, and relative paths start at the list's folder.

    Args:
        sources: One of these, or several.
        recursive: Whether to descend into the subfolders of folders.
        results: A folder whose files are left out of folders and patterns above it: results of a run before.

    Raises:
        DatasetError: A path does not exist, a list cannot be read or names a missing file, or no image is found.
    """
    several = not isinstance(sources, str) and isinstance(sources, Iterable)
    given = [str(source) for source in (sources if several else [sources])]  # type: ignore[union-attr]
    all_of_them = Listing()
    for source in given:
        listing = Listing()
        above = _add(listing, source, recursive)
        if results is not None and above is not None and not _within(above, results):
            listing.leave_out(results)
        all_of_them.files += listing.files
        all_of_them.skipped += listing.skipped
    return checked(all_of_them, given, recursive)


def _add(listing: Listing, source: str, recursive: bool) -> Path | None:
    """Add the files of one source, and return the folder that was searched."""
    path = Path(source)
    if source.startswith(DATASET_PREFIX) and not os.path.exists(path):
        raise DatasetError(
            f"{source} is a data set, where files are needed",
            expected=_FORMS,
            remedy="save its images as files first, with names of their own",
        )
    if os.path.lexists(path):
        if path.suffix.lower() in LIST_SUFFIXES and found_at(path) == FILE:
            listing.files += _listed(path)
            return None
        add_path(listing, path, recursive)
        return path if path.is_dir() else None
    if glob.has_magic(source):
        return _add_matching(listing, source)
    raise DatasetError(f"{source[:_SHOWN]} does not exist", expected=_FORMS, remedy="check the path")


def _within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _add_matching(listing: Listing, pattern: str) -> Path:
    suffix = Path(pattern).suffix
    any_suffix = bool(suffix) and not glob.has_magic(suffix)
    top = _fixed_part(Path(pattern))
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)), key=natural_key)
    before = len(listing.files)
    for path in matches:
        found = found_at(path)
        if found == FILE and (any_suffix or listing.take(path)):
            listing.files.append(Found(path, path.relative_to(top)))
    if len(listing.files) == before:
        raise DatasetError(
            f"No image matches {pattern}",
            found="0 files with a known suffix",
            expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}",
            remedy="check the pattern, and quote it where the shell would expand it; ** descends into subfolders",
        )
    return top


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part of a pattern that is variable."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _listed(path: Path) -> list[Found]:
    check_file(path, DatasetError, "a list of paths", _MAX_LIST_BYTES)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path} cannot be read as a list of images",
            found=f"{type(error).__name__}: {error}"[:200],
            expected="text in UTF-8 with one path per line",
            remedy="pass the images themselves",
        ) from error
    named = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    files = [(number, path.parent / line) for number, line in named if line and not line.startswith("#")]
    lost = next(((number, file) for number, file in files if found_at(file) != FILE), None)
    if lost is not None or not files:
        raise DatasetError(
            f"{path} names no image" if lost is None else f"Line {lost[0]} of {path} names no file",
            found="only empty lines and comments" if lost is None else f"{str(lost[1])[:_SHOWN]}, {found_at(lost[1])}",
            expected="one path of an image per line, absolute or relative to the list's folder",
            remedy="correct the list",
        )
    return [Found(file, _below(file, path.parent)) for _, file in files]


def _below(file: Path, folder: Path) -> Path:
    """The path of a listed file below the list's folder; where it lies elsewhere, its name."""
    outside = not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts
    return Path(file.name) if outside else file.relative_to(folder)


def _is_parquet(path: Path) -> bool:
    """Whether a path is a Parquet file, or a folder with Parquet files and no image."""
    if not os.path.isdir(path):
        return path.suffix.lower() == ".parquet" and os.path.isfile(path)
    suffixes = {os.path.splitext(name)[1].lower() for _, _, names in os.walk(path) for name in names}
    return ".parquet" in suffixes and not suffixes & set(IMAGE_SUFFIXES)
