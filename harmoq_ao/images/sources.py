"""Images named on a command line: a folder, a file, a glob pattern, a list of paths, or a data set."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

from harmoq_ao.common.errors import DatasetError
from harmoq_ao.images.folders import IMAGE_SUFFIXES, list_images, natural_key
from harmoq_ao.images.hub import dataset_images, exists
from harmoq_ao.images.photographs import HELD_OUT_SHARE
from harmoq_ao.images.reading import EncodedImage
from harmoq_ao.images.records import PathLike

LIST_SUFFIXES = (".txt", ".lst")
"""Suffixes of text files that list images, one path per line."""
DATASET_PREFIX = "hf:"
"""Prefix of the names of data sets."""
_MAX_LIST_BYTES = 16 << 20
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
    """The image files of folders, files, patterns and lists.

    Folders and patterns (``*``, ``?``, ``[...]``, and ``**`` for any subfolders) are in natural order, lists in their
    own. A pattern matches files with a known suffix, unless it ends in a suffix itself. In a list, empty lines and
    comments (``#``) are skipped, and relative paths start at the list's folder.

    Args:
        sources: One of these, or several.
        recursive: Whether to descend into the subfolders of folders.

    Raises:
        DatasetError: A path does not exist, a list cannot be read or names a missing file, or no image is found.
    """
    several = not isinstance(sources, str) and isinstance(sources, Iterable)
    found: list[Path] = []
    for source in sources if several else [sources]:  # type: ignore[union-attr]
        found += _files_of(str(source), recursive)
    return found if found else list_images([])


def _files_of(source: str, recursive: bool) -> list[Path]:
    path = Path(source)
    if source.startswith(DATASET_PREFIX) and not exists(path):
        raise DatasetError(
            f"{source} is a data set, where files are needed",
            expected=_FORMS,
            remedy="save its images as files first, with names of their own",
        )
    if exists(path):
        is_list = path.suffix.lower() in LIST_SUFFIXES and path.is_file()
        return _listed(path) if is_list else list_images(path, recursive)
    if glob.has_magic(source):
        return _matching(source)
    raise DatasetError(f"{source} does not exist", expected=_FORMS, remedy="check the path")


def _matching(pattern: str) -> list[Path]:
    suffix = Path(pattern).suffix
    any_suffix = bool(suffix) and not glob.has_magic(suffix)
    paths = (Path(name) for name in glob.glob(pattern, recursive=True))
    files = [p for p in paths if (any_suffix or p.suffix.lower() in IMAGE_SUFFIXES) and p.is_file()]
    if not files:
        raise DatasetError(
            f"No image matches {pattern}",
            found="0 files with a known suffix",
            expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}",
            remedy="check the pattern, and quote it where the shell would expand it; ** descends into subfolders",
        )
    return sorted(files, key=natural_key)


def _listed(path: Path) -> list[Path]:
    try:
        if path.stat().st_size > _MAX_LIST_BYTES:
            raise DatasetError(f"{path} is too large for a list of paths", found=f"{path.stat().st_size} bytes")
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
    lost = next(((number, file) for number, file in files if not (exists(file) and file.is_file())), None)
    if lost is not None or not files:
        raise DatasetError(
            f"{path} names no image" if lost is None else f"Line {lost[0]} of {path} names no file",
            found="only empty lines and comments" if lost is None else str(lost[1])[:200],
            expected="one path of an image per line, absolute or relative to the list's folder",
            remedy="correct the list",
        )
    return [file for _, file in files]


def _is_parquet(path: Path) -> bool:
    """Whether a path is a Parquet file, or a folder with Parquet files and no image."""
    if not exists(path) or not path.is_dir():
        return path.suffix.lower() == ".parquet" and exists(path)
    inside = (p.suffix.lower() for p in path.rglob("*") if p.is_file())
    suffixes = set(inside)
    return ".parquet" in suffixes and not suffixes & set(IMAGE_SUFFIXES)
