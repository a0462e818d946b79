"""Benchmarks: references paired with their low-resolution versions, in the layouts and by the names that people use."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from harmoq_ao.common.errors import ConfigError, DatasetError
from harmoq_ao.images.folders import list_images
from harmoq_ao.images.reading import image_size, load_image
from harmoq_ao.images.records import ImageRecord, PathLike

_NAMES = (
    ("{name}", "{name}x{scale}"),  # EDSR, DIV2K
    ("{name}", "{name}"),  # BasicSR
    ("{name}", "{name}_x{scale}"),
    ("{name}", "{name}_bicLRx{scale}"),  # ESRGAN's MATLAB script
    ("{name}", "{name}_LRBI_x{scale}"),
    ("{name}_HR_x{scale}", "{name}_LRBI_x{scale}"),  # RCAN
    ("{name}_HR_x{scale}", "{name}_LR_x{scale}"),
    ("{name}_SRF_{scale}_HR", "{name}_SRF_{scale}_LR"),  # SelfExSR
    ("{name}_HR", "{name}_LR{scale}"),  # RealSR
    ("{name}_HR", "{name}_LR"),
)
"""Names of a reference and of its low-resolution version; of those that pair equally many images the first counts."""
_HR_FOLDERS = ("hr", "gt", "gtmod{scale}", "gtmod12", "original", "*_hr")
_LR_FOLDERS = ("lr_bicubic", "lrbicx{scale}", "lr", "*_lr_bicubic")
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True)
class ImagePair:
    """A reference and its low-resolution version; ``name`` is what their file names have in common."""

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


def load_pairs(hr: PathLike, lr: PathLike | None, scale: int, lr_name: str | None = None) -> list[ImagePair]:
    """Pair references with low-resolution images by name, and check their sizes from the headers.

    Takes a benchmark root, or two folders, each of which may have subfolders by scale, such as ``X2``. Roots are known
    with ``HR`` and ``LR_bicubic/X2`` (EDSR), ``GTmod12`` and ``LRbicx2`` (BasicSR), ``DIV2K_valid_HR`` and
    ``DIV2K_valid_LR_bicubic/X2``, and ``image_SRF_2`` with both (SelfExSR). A low-resolution image is named like its
    reference, or as EDSR, ESRGAN, RCAN, SelfExSR and RealSR name it (``x2``, ``_bicLRx2``, ``_LRBI_x2``, ...).

    Args:
        hr: Folder of references, or a benchmark root when ``lr`` is ``None``.
        lr: Folder of low-resolution images, or of ``X{scale}`` folders.
        scale: Upscaling factor; references are compared after cropping to a multiple of it.
        lr_name: The low-resolution name, such as ``{name}_small`` or ``{name}-{scale}x``, where it is none of these.

    Returns:
        The pairs in natural order of their names.

    Raises:
        ConfigError: ``lr_name`` is no pattern.
        DatasetError: A folder is missing or empty, files have no partner, or sizes do not match.
        ImageError: A file's header cannot be read.
    """
    names = _NAMES if lr_name is None else (("{name}", _checked_pattern(lr_name)),)
    hr_folder, lr_folder = _pair_folders(Path(hr), None if lr is None else Path(lr), scale)
    references, inputs = list_images(hr_folder), list_images(lr_folder)
    matched = [(_by_name(references, high, scale), _by_name(inputs, low, scale)) for high, low in names]
    if hr_folder == lr_folder:  # the names alone tell them apart
        matched = [(high, low) for high, low in matched if not high.keys() & _stems(low)]
    highs, lows = max(matched, key=lambda pair: len(pair[0].keys() & pair[1].keys()), default=({}, {}))
    paired = {path for name in highs.keys() & lows.keys() for path in (highs[name], lows[name])}
    lonely = [path for path in (*references, *inputs) if path not in paired] if hr_folder != lr_folder else []
    if lonely or not paired:
        raise DatasetError(
            f"The images of {hr_folder} and {lr_folder} do not pair up",
            found=f"without a partner: {_named(lonely or references)}",
            expected=f"for every NAME of {hr_folder.name} one of "
            f"{', '.join(low.format(name='NAME', scale=scale) for _, low in names)} in {lr_folder.name}",
            remedy="add or remove the images named here, or give the pattern of low-resolution names (--lr-name)",
        )
    pairs = [ImagePair(name, path, lows[name], scale) for name, path in highs.items() if name in lows]
    _check_sizes(pairs)
    return pairs


def _checked_pattern(pattern: str) -> str:
    fields = re.findall(r"\{[^{}]*\}?|\}", pattern)
    if fields.count("{name}") != 1 or set(fields) - {"{name}", "{scale}"} or "/" in pattern:
        raise ConfigError(
            "The pattern of low-resolution names cannot be used",
            found=pattern,
            expected="a file name without suffix, with {name} once and perhaps {scale}, such as {name}_bicLRx{scale}",
        )
    return pattern


def _by_name(paths: Sequence[Path], pattern: str, scale: int) -> dict[str, Path]:
    """The paths whose file names have a form, by their ``{name}``; ``X2`` is as good as ``x2``."""
    before, after = (re.escape(part.replace("{scale}", str(scale))) for part in pattern.split("{name}"))
    form = re.compile(f"(?i:{before})(.+)(?i:{after})", re.DOTALL)
    found: dict[str, Path] = {}
    for path in paths:
        match = form.fullmatch(path.stem)
        if match is None:
            continue
        first = found.setdefault(match[1], path)
        if first is not path:
            raise DatasetError(
                "Two images of one folder share a name",
                found=f"{first.name} and {path.name} in {path.parent}",
                expected="names that differ in more than their suffix",
                remedy="rename or remove one of them",
            )
    return found


def _stems(paths: Mapping[str, Path]) -> set[str]:
    return {path.stem for path in paths.values()}


# --- folders ----------------------------------------------------------------------------------------------------------


def _pair_folders(hr: Path, lr: Path | None, scale: int) -> tuple[Path, Path]:
    if scale < 1:
        raise DatasetError("The scale is not an upscaling factor", found=scale, expected="an integer of at least 1")
    hr, lr = _of_root(hr, scale) if lr is None else (hr, lr)
    by_scale = _scale_folders(lr)
    if by_scale and scale not in by_scale:
        raise DatasetError(
            f"{lr} has no images for scale {scale}",
            found=", ".join(by_scale[other].name for other in sorted(by_scale)),
            expected=f"a folder X{scale}",
            remedy="choose a scale that is there, or add its folder",
        )
    return _scale_folders(hr).get(scale, hr), by_scale.get(scale, lr)


def _of_root(root: Path, scale: int) -> tuple[Path, Path]:
    """The folders of references and of low-resolution images in a benchmark's root."""
    folders = _subfolders(root)
    for both in (root / f"image_SRF_{scale}", root):
        if any(f"_SRF_{scale}_HR." in name for name in _names_in(both)):
            return both, both
    found = [
        next((folder for pattern in patterns for folder in _named_like(folders, pattern, scale)), None)
        for patterns in (_HR_FOLDERS, _LR_FOLDERS)
    ]
    if found[0] is None or found[1] is None:
        raise DatasetError(
            f"{root} is not a benchmark folder",
            found="no subfolders HR and LR_bicubic",
            expected=f"{root / 'HR'} and {root / 'LR_bicubic' / f'X{scale}'}, or another usual layout",
            remedy="name the two folders one by one",
        )
    return found[0], found[1]


def _named_like(folders: Mapping[str, Path], pattern: str, scale: int) -> list[Path]:
    """The one folder of a name; none where a pattern fits several (``*_HR`` of training and of validation)."""
    fitting = [path for name, path in folders.items() if fnmatchcase(name, pattern.format(scale=scale))]
    return fitting if len(fitting) == 1 else []


def _subfolders(folder: Path) -> dict[str, Path]:
    """The folders below a folder by their names in lower case; none where it cannot be listed."""
    return {name.lower(): folder / name for name in _names_in(folder) if os.path.isdir(folder / name)}


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):  # what is wrong with it is said where its images are listed
        return []


def _scale_folders(folder: Path) -> dict[int, Path]:
    named = ((re.fullmatch(r"x(\d{1,3})", name), path) for name, path in _subfolders(folder).items())
    return {int(match[1]): path for match, path in named if match}


# --- sizes ------------------------------------------------------------------------------------------------------------


def _check_sizes(pairs: Sequence[ImagePair]) -> None:
    """MATLAB's ``imresize`` rounds sizes up, cropping first rounds them down; both begin at the top left."""
    wrong = []
    for pair in pairs:
        high, low = image_size(pair.hr), image_size(pair.lr)
        if any(
            small not in (side // pair.scale, -(-side // pair.scale)) for side, small in zip(high, low, strict=True)
        ):
            wrong.append(f"{pair.name} ({low[0]}x{low[1]} for {high[0]}x{high[1]})")
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
