"""Where the results of many images go: names that do not collide, checked before the first image is read."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harmoq_ao.common.errors import ConfigError, DatasetError, OutputError
from harmoq_ao.common.output import check_output_file, check_output_folder
from harmoq_ao.images import PICTURE_SUFFIXES, WRITABLE, Found
from harmoq_ao.runtime.file_jobs import Job


@dataclass(frozen=True)
class Naming:
    """How results are named.

    Args:
        output: Folder of the results; or, for one image, its file, recognized by its suffix.
        suffix: Text appended to each name.
        mirror: Repeat the folders below each source in the output.
        overwrite: Replace results that are there.
        skip_existing: Leave images alone whose results are there.
    """

    output: Path
    suffix: str = ""
    mirror: bool = False
    overwrite: bool = False
    skip_existing: bool = False

    def __post_init__(self) -> None:
        if "/" in self.suffix or "\\" in self.suffix:
            raise ConfigError("A suffix is part of a file name", found=self.suffix, expected="no slash")
        if self.overwrite and self.skip_existing:
            raise ConfigError(
                "What is there cannot be both replaced and kept",
                found="--overwrite and --skip-existing",
                expected="one of them",
            )

    @property
    def names_a_file(self) -> bool:
        """Whether the output is meant as a file: it has the suffix of an image, and is no folder."""
        return self.output.suffix.lower() in PICTURE_SUFFIXES and not os.path.isdir(self.output)


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        jobs: The images to upscale.
        kept: Images whose results are there already.
        results: Images that are results of others themselves, from a run before into their own folder.
    """

    jobs: list[Job] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)


def plan_jobs(files: Sequence[Found], naming: Naming) -> Plan:
    """Decide where each image goes; takes time in proportion to their number.

    A suffix that cannot be written (`.gif`) becomes `.png`; where another image has that name, it is appended
    (`frame.gif.png` beside `frame.png`).

    Args:
        files: The images.
        naming: How they are named.

    Raises:
        ConfigError: Several images are to go to one file.
        DatasetError: Two images have the same result.
        OutputError: The output cannot be written to, a result exists already, or is the source of another.
    """
    files = list({file.path: file for file in files}.values())
    if naming.names_a_file:
        jobs = [_single(files, naming)]
    else:
        check_output_folder(naming.output)
        jobs = [Job(path, target) for path, target in _named(files, naming).items()]
    return _sorted_out(jobs, naming)


def _single(files: Sequence[Found], naming: Naming) -> Job:
    if len(files) != 1 or naming.suffix:
        found = "a --suffix" if len(files) == 1 else f"{len(files)} images"
        raise ConfigError(
            f"{naming.output} names one file",
            found=found,
            expected="one image and no --suffix, or a folder",
            remedy="name a folder with --output",
        )
    if naming.output.suffix.lower() not in WRITABLE:
        raise OutputError(
            f"{naming.output} cannot be written",
            found=f"suffix '{naming.output.suffix}'",
            expected=f"one of {', '.join(WRITABLE)}",
            remedy="rename the output",
        )
    check_output_file(naming.output)
    return Job(files[0].path, naming.output)


def _named(files: Sequence[Found], naming: Naming) -> dict[Path, Path]:
    """The target of each image."""
    wanted: dict[Path, list[Found]] = defaultdict(list)
    for file in files:
        wanted[_target(file, naming)].append(file)
    targets: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for plain, same in wanted.items():
        for file in same:
            target = plain if len(same) == 1 or _kept_suffix(file) else _target(file, naming, whole=True)
            other = taken.setdefault(target, file.path)
            if other is not file.path:
                raise DatasetError(
                    "Two images would be written to one file",
                    found=f"{other} and {file.path}, to {target}",
                    remedy="upscale them into different folders, or keep theirs with --recursive",
                )
            targets[file.path] = target
    return {file.path: targets[file.path] for file in files}


def _kept_suffix(file: Found) -> bool:
    return file.path.suffix.lower() in WRITABLE


def _target(file: Found, naming: Naming, whole: bool = False) -> Path:
    below = file.below if naming.mirror else Path(file.below.name)
    stem = below.name if whole else below.stem
    return naming.output / below.parent / f"{stem}{naming.suffix}{below.suffix if _kept_suffix(file) else '.png'}"


def _sorted_out(jobs: Sequence[Job], naming: Naming) -> Plan:
    """Compare the targets with what exists; files are compared as the file system does, not by name."""
    there = {job.target: identity for job in jobs if (identity := _identity(job.target)) is not None}
    if not there:
        return Plan(list(jobs))
    sources = {identity: job for job in jobs if (identity := _identity(job.image)) is not None}
    results = _results_among(jobs, there, sources, naming)
    plan = Plan(results=results)
    dropped = set(results)
    for job in jobs:
        if job.image in dropped:
            continue
        if naming.skip_existing and job.target in there and _is_whole(job.target):
            plan.kept.append(job.image)
        else:
            plan.jobs.append(job)
    if not naming.skip_existing and not naming.overwrite:
        raise OutputError(
            f"{len(there)} of the images exist already",
            found=next(iter(there)),
            remedy="pass --overwrite, or --skip-existing to make those that are missing, or another --output",
        )
    return plan


def _is_whole(target: Path) -> bool:
    """Whether a result is there: ours appear as a whole, an empty file is what a full disk or another program left."""
    return os.path.isfile(target) and os.path.getsize(target) > 0


def _results_among(
    jobs: Sequence[Job], there: Mapping[Path, tuple[int, int]], sources: Mapping[tuple[int, int], Job], naming: Naming
) -> list[Path]:
    """The images that are results of others; a result that may not be taken for one is an error."""
    results = []
    for job in jobs:
        replaced = sources.get(there[job.target]) if job.target in there else None
        if replaced is None:
            continue
        if replaced is job or not naming.skip_existing:
            raise OutputError(
                "An image would replace its own source"
                if replaced is job
                else "An image would replace another's source",
                found=job.target,
                remedy="choose another --output, or give a --suffix",
            )
        results.append(replaced.image)
    return results


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of a file, or None where there is none, or the system does not say: writing then fails."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
