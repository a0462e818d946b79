"""Folders of images on a local Ray cluster: every image once, whatever happens to the workers."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harmoq_ao.common.errors import ConfigError, ImageError, RayError
from harmoq_ao.runtime import ray_jobs
from harmoq_ao.runtime.file_jobs import Job, UpscaleFile, upscale_here
from harmoq_ao.runtime.ray_jobs import upscale_on_ray


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def jobs_in(folder: Path, names: str) -> list[Job]:
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    for index, name in enumerate(names):
        Image.fromarray(np.full((4, 5, 3), index, np.uint8)).save(folder / "in" / f"{name}.png")
    return [Job(folder / "in" / f"{name}.png", folder / "out" / f"{name}.png") for name in names]


def trouble(folder: Path) -> Callable[[], UpscaleFile]:
    """Doubles images, but `k` kills its worker once, `x` always, `b` is broken and `e` meets a bug of the program.

    Nested, so that it travels to the workers by value.
    """

    def open_upscale() -> UpscaleFile:
        from harmoq_ao.images import load_image, save_image

        def upscale(job: Job) -> None:
            name = job.image.stem
            with open(folder / f"tried-{name}", "a") as tried:
                tried.write("x")
            if name == "x" or (name == "k" and (folder / "tried-k").stat().st_size == 1):
                os._exit(1)
            if name == "b":
                raise ImageError("This image is broken", remedy="repair it")
            if name == "e":
                raise ZeroDivisionError("a bug")
            record = load_image(job.image)
            pixels = record.pixels[None].repeat_interleave(2, -1).repeat_interleave(2, -2)
            save_image(job.target, pixels, like=record)

        return upscale

    return open_upscale


@pytest.mark.usefixtures("_cluster")
def test_every_image_ends_once_whatever_happens_to_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "ATTEMPTS", 2)  # a worker takes seconds to start
    jobs = jobs_in(tmp_path, "akxcbedfgh")
    ended: list[None] = []
    failures = upscale_on_ray(jobs, trouble(tmp_path), lambda: ended.append(None))
    reasons = {path.stem: reason for path, reason in failures}
    assert list(reasons) == ["x", "b", "e"]
    assert "2 workers died" in reasons["x"]
    assert "repair it" in reasons["b"]
    assert "a bug" in reasons["e"]
    assert len(ended) == len(jobs)
    tried = {path.name[-1]: path.stat().st_size for path in tmp_path.glob("tried-*")}
    assert tried == dict.fromkeys("abcdefgh", 1) | {"k": 2, "x": 2}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.png" for name in "acdfghk"]
    for index, job in enumerate(jobs):
        if job.target.exists():
            pixels = np.asarray(Image.open(job.target))
            assert pixels.shape == (8, 10, 3)
            assert (pixels == index).all()


@pytest.mark.usefixtures("_cluster")
def test_what_fits_no_image_or_no_worker_ends_everything(tmp_path: Path) -> None:
    def open_strict() -> UpscaleFile:
        def upscale(job: Job) -> None:
            raise ConfigError("The overlap is out of range")

        return upscale

    def open_nothing() -> UpscaleFile:
        raise RuntimeError("no such model here")

    jobs = jobs_in(tmp_path, "a")
    with pytest.raises(ConfigError, match="overlap"):
        upscale_on_ray(jobs, open_strict, lambda: None)
    with pytest.raises(RayError, match="no such model here"):
        upscale_on_ray(jobs, open_nothing, lambda: None)


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match="harmoq-ao\\[ray\\]"):
        upscale_on_ray(jobs_in(tmp_path, "a"), trouble(tmp_path), lambda: None)


def test_in_one_process_the_same_images_fail(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, "abc")
    ended: list[None] = []
    failures = upscale_here(jobs, trouble(tmp_path)(), lambda: ended.append(None))
    assert [(path.stem, "repair it" in reason) for path, reason in failures] == [("b", True)]
    assert len(ended) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
