"""Folders of images: listing in natural order, and pairing references with their low-resolution versions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harmoq_ao.common.errors import DatasetError
from harmoq_ao.images.reading import image_size, load_image
from harmoq_ao.images.records import ImageRecord, PathLike

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
"""Suffixes of the images that folders are searched for, case-insensitive."""

_NAMED_IN_ERRORS = 5


@dataclass(frozen=True)
class ImagePair:
    """A reference and its low-resolution version; ``name`` is the reference's file name without suffix."""

    name: str
    hr: Path
    lr: Path
    scale: int

    def load(self) -> tuple[ImageRecord, ImageRecord]:
        """Decode the low-resolution image and the reference, in this order.

        Raises:
            ImageError: A file cannot be decoded.
        """
        return load_image(self.lr), load_image(self.hr)


def list_images(source: PathLike | Iterable[PathLike], recursive: bool = False) -> list[Path]:
    """The image files of a folder, or of files and folders mixed.

    Folders are listed in natural order (``img2`` before ``img10``), without hidden files; files named one by one keep
    their order and may have any suffix.

    Args:
        source: A folder, a file, or several of them.
        recursive: Whether to descend into subfolders.

    Raises:
        DatasetError: A path does not exist, or no image is found.
    """
    sources = [Path(source)] if isinstance(source, str) or not isinstance(source, Iterable) else list(map(Path, source))
    found: list[Path] = []
    for path in sources:
        if path.is_dir():
            found += _images_in(path, recursive)
        elif path.is_file():
            found.append(path)
        else:
            raise DatasetError(
                f"{path} does not exist", expected="a folder of images or an image file", remedy="check the path"
            )
    if not found:
        hint = "" if recursive else ", or list subfolders with recursive"
        raise DatasetError(
            f"There is no image in {', '.join(map(str, sources)) or 'an empty list'}",
            found="0 files with a known suffix",
            expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}",
            remedy=f"check the path{hint}",
        )
    return found


def load_pairs(hr: PathLike, lr: PathLike | None, scale: int) -> list[ImagePair]:
    """Pair references with low-resolution images by name, and check their sizes from the headers.

    Takes a benchmark root (``root/HR`` and ``root/LR_bicubic/X2``), or two folders, of which the second may have
    subfolders by scale, such as ``X2``. A low-resolution image is named like its reference, or with ``x2`` appended.

    Args:
        hr: Folder of references, or a benchmark root when ``lr`` is ``None``.
        lr: Folder of low-resolution images, or of ``X{scale}`` folders.
        scale: Upscaling factor; references are compared after cropping to a multiple of it.

    Returns:
        The pairs in natural order of their names.

    Raises:
        DatasetError: A folder is missing or empty, files have no partner, or sizes do not match.
        ImageError: A file's header cannot be read.
    """
    hr_folder, lr_folder = _pair_folders(Path(hr), None if lr is None else Path(lr), scale)
    references, inputs = _by_stem(list_images(hr_folder)), _by_stem(list_images(lr_folder))
    naming = max((f"x{scale}", ""), key=lambda suffix: _matches(references, inputs, suffix))
    partners = {stem: f"{stem}{naming}" for stem in references}
    lonely_hr = [references[stem] for stem, partner in partners.items() if partner not in inputs]
    lonely_lr = [path for stem, path in inputs.items() if stem not in partners.values()]
    if lonely_hr or lonely_lr:
        raise DatasetError(
            f"The images of {hr_folder} and {lr_folder} do not pair up",
            found=f"without a partner: {_named(lonely_hr + lonely_lr)}",
            expected=f"for every NAME of {hr_folder.name} either NAMEx{scale} or NAME in {lr_folder.name}",
            remedy="add or remove the images named here",
        )
    pairs = [ImagePair(stem, references[stem], inputs[partner], scale) for stem, partner in partners.items()]
    _check_sizes(pairs)
    return pairs


def natural_key(path: Path) -> list[list[tuple[int, int, str]]]:
    """Sort key that compares numbers in a path as numbers, and letters case-insensitively."""

    def key(name: str) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", name.lower())
        return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]

    return [key(name) for name in (*path.parent.parts, path.stem, path.suffix)]


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    files = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        (
            path
            for path in files
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.is_file()
        ),
        key=natural_key,
    )


def _pair_folders(hr: Path, lr: Path | None, scale: int) -> tuple[Path, Path]:
    if scale < 1:
        raise DatasetError("The scale is not an upscaling factor", found=scale, expected="an integer of at least 1")
    if lr is None:
        hr, lr = hr / "HR", hr / "LR_bicubic"
        if not (hr.is_dir() and lr.is_dir()):
            raise DatasetError(
                f"{hr.parent} is not a benchmark folder",
                found="no subfolders HR and LR_bicubic",
                expected=f"{hr} and {lr / f'X{scale}'}",
                remedy="name the two folders one by one",
            )
    by_scale = _scale_folders(lr)
    if scale in by_scale:
        lr = by_scale[scale]
    elif by_scale:
        raise DatasetError(
            f"{lr} has no images for scale {scale}",
            found=", ".join(by_scale[other].name for other in sorted(by_scale)),
            expected=f"a folder X{scale}",
            remedy="choose a scale that is there, or add its folder",
        )
    return hr, lr


def _scale_folders(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    named = ((re.fullmatch(r"[xX](\d+)", path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in named if match}


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    stems: dict[str, Path] = {}
    for path in paths:
        if path.stem in stems:
            raise DatasetError(
                "Two images of one folder share a name",
                found=f"{stems[path.stem].name} and {path.name} in {path.parent}",
                expected="names that differ in more than their suffix",
                remedy="rename or remove one of them",
            )
        stems[path.stem] = path
    return stems


def _matches(references: dict[str, Path], inputs: dict[str, Path], suffix: str) -> int:
    return sum(f"{stem}{suffix}" in inputs for stem in references)


def _check_sizes(pairs: Sequence[ImagePair]) -> None:
    wrong = []
    for pair in pairs:
        (height, width), low = image_size(pair.hr), image_size(pair.lr)
        if (height // pair.scale, width // pair.scale) != low:
            wrong.append(f"{pair.name} ({low[0]}x{low[1]} for {height}x{width})")
    if wrong:
        scale = pairs[0].scale
        raise DatasetError(
            f"Sizes do not match at scale {scale} (height x width, low-resolution for reference)",
            found=_named(wrong),
            expected=f"references {scale} times as large, after cropping to a multiple of {scale}",
            remedy="check the scale and the folders",
        )


def _named(items: Sequence[Path] | Sequence[str]) -> str:
    names = [item if isinstance(item, str) else f"{item.parent.name}/{item.name}" for item in items]
    more = len(names) - _NAMED_IN_ERRORS
    return ", ".join(names[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
