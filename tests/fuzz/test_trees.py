"""Folders of anything through the whole of upscaling, and things in the place of files that are none."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common.errors import CheckpointError, HarmoqError
from harmoq_ao.common.output import check_output_file, check_output_folder
from harmoq_ao.harmonization.checkpoint import Checkpoint
from harmoq_ao.images import hub, image_files, image_size, list_sources, load_image, load_pairs
from harmoq_ao.runtime.file_jobs import FileUpscaler, upscale_here
from harmoq_ao.runtime.targets import Naming, plan_jobs
from harmoq_ao.runtime.upscaler import Upscaler, open_float, open_model
from tests.fuzz.damage import any_of, limited, run_cases
from tests.fuzz.images import IMAGES, INTACT
from tests.models import converted

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX's")

# --- what is no file --------------------------------------------------------------------------------------------------


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "sparse": _sparse,
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "nothing": lambda path: None,
    "empty": Path.touch,
}


def _progress(path: Path) -> None:
    if Checkpoint(path, {}).load() is None:
        raise CheckpointError("no progress, so there is nothing to resume")


def _of_transformers(path: Path) -> None:
    if os.path.isdir(path.parent):
        (path.parent / "config.json").write_text('{"architectures": ["Swin2SRForImageSuperResolution"]}')
    open_float(path.parent)


def _image_of_data_set(path: Path) -> None:
    with hub._typed_errors(hub.DatasetName.parse("x")):
        hub._read(str(path))


LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "image": ("a.png", load_image),
    "size": ("a.png", image_size),
    "images": ("a.png", lambda path: [load_image(file) for file in image_files(path)]),
    "calibration": ("a.parquet", lambda path: h.find_images(path, learned=1)),
    "list": ("a.txt", image_files),
    "checkpoint": ("a.pth", open_float),
    "model": ("a.safetensors", open_model),
    "config": ("config.json", lambda path: h.load_quantized(path.parent, model=nn.Identity())),
    "weights": ("weights", lambda path: h.load_quantized(path.parent, model=nn.Identity())),
    "snapshot": ("refs/main", lambda path: open_model(path.parent.parent)),
    "progress": ("progress.safetensors", _progress),
    "transformers": ("model.safetensors", _of_transformers),
    "image of a data set": ("a.png", _image_of_data_set),
    "pairs": ("HR", lambda path: load_pairs(path.parent, None, 2)),
}
ODD_PATHS = ("x" * 300, "a\0b", "a/" * 3000, "x" * 5000, "\ud800", "")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, kind: str, loader: str) -> None:
    name, load = LOADERS[loader]
    path = tmp_path / name
    if loader == "weights":
        h.save_quantized(converted("linears", h.HarmoqConfig(4, 4)), tmp_path)
        path = next(tmp_path.glob("*.safetensors"))
        path.unlink()
    path.parent.mkdir(exist_ok=True)
    SPECIAL[kind](path)
    with limited(), pytest.raises(HarmoqError):
        load(path)


@pytest.mark.parametrize("path", ODD_PATHS, ids=lambda path: repr(path[:8]))
@pytest.mark.parametrize("loader", LOADERS)
def test_paths_that_no_system_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, loader: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with limited(), pytest.raises(HarmoqError):
        LOADERS[loader][1](Path(path) / "a")


@pytest.mark.parametrize("path", [*ODD_PATHS[:4], *SPECIAL], ids=lambda path: repr(path[:16]))
def test_outputs_are_checked_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    if path in SPECIAL:
        SPECIAL[path](tmp_path / path)
    for check, may in (
        (check_output_file, ("sparse", "nothing", "empty")),
        (check_output_folder, ("folder", "nothing")),
    ):
        with limited():
            if path in may:
                check(path)
            else:
                with pytest.raises(HarmoqError):
                    check(path)


# --- trees ------------------------------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """Repeats every pixel; of some images it has not been foreseen what they are."""

    def forward(self, image: Tensor) -> Tensor:
        if float(image.mean()) > 0.6:
            raise ZeroDivisionError("a bug")
        return image.repeat_interleave(2, -1).repeat_interleave(2, -2)


@dataclass(frozen=True)
class Entry:
    """A file to be, or something else: its path, and what makes it."""

    path: str
    make: Callable[[Path], Any]


_STEMS = any_of(
    *(
        "a",
        "frame",
        "frame1",
        "-o",
        "a b",
        "[red]",
        "*",
        "{0}",
        "%s",
        "Größe",
        "東京",
        "caf\udce9",
        "new\nline",
        "x" * 200,
    ),
    *("ü" * 120, ".hidden", "a.png", "COM1", "~", "'", "\x1b[2J", "a_x2"),
)
_SUFFIXES = any_of(".png", ".PNG", ".jpg", ".gif", ".tif", ".bmp", ".jfif", ".tga", ".avif", ".heic", ".txt", "", ".")
_FOLDERS = any_of("", "", "s/", "s/t/", "folder.png/", ".cache/", "out/", "Ü/")
_MAKES = st.one_of(
    st.one_of(INTACT, IMAGES).map(lambda case: lambda path: path.write_bytes(case.data)),
    any_of(*SPECIAL.values()),
)
TREES = st.lists(
    st.builds(
        lambda folder, stem, suffix, make: Entry(folder + stem + suffix, make), _FOLDERS, _STEMS, _SUFFIXES, _MAKES
    ),
    min_size=1,
    max_size=8,
)
NAMINGS = st.builds(
    lambda out, suffix, mirror: lambda root: Naming(root / out, suffix, mirror, skip_existing=True),
    any_of("out", "new/deep", ".", "s"),
    any_of("", "_x2"),
    st.booleans(),
)


def _made(root: Path, entries: list[Entry]) -> None:
    for entry in entries:
        path = root / entry.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                entry.make(path)
        except OSError:  # a name too long, or a file where a folder would be
            continue


def _contents(root: Path) -> dict[str, bytes]:
    """Bytes of the regular files below a folder; links, pipes and sparse files are left alone."""
    walked = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    files = (path for path in walked if not path.is_symlink() and path.is_file() and path.stat().st_size < 1 << 20)
    return {str(path): path.read_bytes() for path in files}


def test_folders_of_anything(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    numbers = count()
    upscale = FileUpscaler(Upscaler(Doubling(), "doubling", 2), tile=16, overlap=4)

    def run(case: tuple[list[Entry], Callable[[Path], Naming]]) -> None:
        root = tmp_path / str(next(numbers))
        root.mkdir()
        _made(root, case[0])
        before, naming = _contents(root), case[1](root)
        try:
            listing = list_sources(str(root), naming.mirror, naming.output)
            plan = plan_jobs(listing.files, naming)
            failed = {image for image, reason in upscale_here(plan.jobs, upscale, lambda: None) if reason}
            after = _contents(root)
            done = [job for job in plan.jobs if job.image not in failed]
            for job in done:
                assert image_size(job.target) == tuple(2 * side for side in load_image(job.image).size)
            changed = {path for path in after if before.get(path) != after[path]}
            assert changed == {str(job.target) for job in done}, "litter, or a source that was replaced"
            assert before.keys() <= after.keys()
            outcomes.update(done=len(done), failed=len(failed), skipped=len(listing.skipped))
            if naming.suffix or naming.output.name in ("out", "deep"):  # else results lie among images, unmarked
                again = plan_jobs(list_sources(str(root), naming.mirror, naming.output).files, naming)
                assert {job.image for job in again.jobs} <= failed, "what is done is done"
                outcomes.update(kept=len(again.kept))
        except HarmoqError:
            assert _contents(root) == before
            outcomes["refused"] += 1
        finally:
            shutil.rmtree(root)

    with torch.no_grad():
        run_cases(st.tuples(TREES, NAMINGS), 400, run, offset=11)
    assert min(outcomes[name] for name in ("done", "failed", "skipped", "kept", "refused")) >= 50, outcomes
