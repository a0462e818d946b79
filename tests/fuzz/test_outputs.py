"""Damaged images through the whole of upscaling: each is either written whole or listed with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.images import image_size, load_image
from harmoq_ao.runtime.file_jobs import FileUpscaler, Job, upscale_here
from harmoq_ao.runtime.upscaler import Upscaler
from tests.fuzz.damage import FileCase, run_cases
from tests.fuzz.images import IMAGES
from tests.models import converted

COUNT = 300
TAIL = 16  # bytes of what stood in a target's place before


@pytest.mark.slow
def test_no_output_is_partial(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    jobs: list[Job] = []

    def add(case: FileCase) -> None:
        path = case.write(source, str(len(jobs)))
        jobs.append(Job(path, output / f"{path.name}.png"))

    run_cases(IMAGES, COUNT, add, offset=7)
    old = bytes(TAIL)
    for job in jobs[::2]:
        job.target.write_bytes(old)  # half of the outputs are there from before
    upscale = FileUpscaler(Upscaler(converted("linears", HarmoqConfig(4, 4)), "linears", 1), tile=64, overlap=8)
    failures = upscale_here(jobs, upscale, lambda: None)
    failed = {image for image, _ in failures}
    assert len(failed) == len(failures)
    assert 25 < len(failed) < len(jobs) - 25
    assert all(reason for _, reason in failures)
    for index, job in enumerate(jobs):
        if job.image not in failed:
            assert load_image(job.target).size == load_image(job.image).size
            assert image_size(job.target)
        elif index % 2 == 0:
            assert job.target.read_bytes() == old, "a failure leaves the former output as it was"
        else:
            assert not job.target.exists()
    known = {job.target.name for job in jobs}
    assert {path.name for path in output.iterdir()} <= known, "temporary files are left"
