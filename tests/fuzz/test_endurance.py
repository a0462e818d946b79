"""Memory of large images in tiles and of many calls; a long run that is ended and continued."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.images import image_size
from harmoq_ao.runtime.file_jobs import FileUpscaler, Job
from harmoq_ao.runtime.tiling import upscale
from harmoq_ao.runtime.upscaler import Upscaler
from tests.fuzz.checkpoints import state
from tests.fuzz.damage import FACTOR
from tests.models import converted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20


def _resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or (VmHWM) at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024


def _peak(call: Callable[[], object]) -> int:
    """Bytes that a call needed beyond what was there before."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    except OSError:
        pytest.skip("the peak of memory cannot be reset here")
    before = _resident()
    call()
    return _resident("VmHWM") - before


class Wide(nn.Module):
    """Trivial, with 128 channels in between at full size: 512 bytes for each pixel of the input."""

    def forward(self, image: Tensor) -> Tensor:
        wide = image.repeat(1, 128 // image.shape[1] + 1, 1, 1)
        return wide[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)


SIDE = 768


def peaks_of_tensors() -> list[int]:
    """What a process of its own does: the peaks of memory of a large image whole, then in tiles."""
    image = torch.rand(1, 3, SIDE, SIDE)
    whole = partial(upscale, Wide(), image, 2)
    return [_peak(whole), _peak(partial(whole, tile=64, overlap=8))]


def _in_own_process(call: str) -> list[int]:
    """The peaks that an expression of this file tells, in a process of its own.

    Large blocks are mapped one by one there. Left alone, glibc raises the size from which it does so with each block
    that is freed, and what it keeps of tiles in a fragmented heap is a matter of chance.
    """
    _peak(lambda: None)  # skips the test where the peak cannot be told
    code = f"import sys; from tests.fuzz.test_endurance import *; sys.stdout.write(json.dumps({call}))"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_of_a_large_image_is_that_of_a_tile() -> None:
    inside = 512 * SIDE**2
    output = 3 * 4 * SIDE**2 * 4
    whole, tiled = _in_own_process("peaks_of_tensors()")
    assert whole > inside
    # The result, and a few tiles.
    assert tiled < output + 24 * MIB < inside / 4


class Nearest(nn.Module):
    """Four pixels in each direction for one."""

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.interpolate(image, scale_factor=4.0)


def peaks_of_files(folder: Path, images: list[str]) -> list[int]:
    """What a process of its own does: the peak of memory from file to file, for each image as PNG and as TIFF."""
    upscale = FileUpscaler(Upscaler(Nearest(), "nearest", 4), tile=128, overlap=16)
    jobs = [Job(folder / image, folder / f"out-{image}.{suffix}") for image in images for suffix in ("png", "tif")]
    return [_peak(partial(upscale, job)) for job in jobs]


def test_memory_from_file_to_file_is_that_of_a_row_of_tiles(tmp_path: Path) -> None:
    width, heights = 256, (512, 6144)  # the low one first: what is kept from then on is no matter of the image
    for height in heights:
        Image.linear_gradient("L").resize((width, height)).convert("RGB").save(tmp_path / f"{height}.png")
    call = f"peaks_of_files(Path({str(tmp_path)!r}), {[f'{height}.png' for height in heights]})"
    peaks = _in_own_process(call)
    for height in heights:
        for suffix in ("png", "tif"):
            assert image_size(tmp_path / f"out-{height}.png.{suffix}") == (4 * height, 4 * width)
    pixels = width * heights[1]
    result = pixels * 16 * 3  # bytes of what becomes of the tall one, as floats four times that
    decoding = pixels * (4 + 3)  # Pillow's image, and the samples taken from it
    for peak in peaks[2:]:
        assert peak < decoding + 24 * MIB < result / 2


@pytest.mark.parametrize(("name", "multiple", "calls"), [("linears", 1, 6000), ("forms", 4, 200)])
def test_memory_does_not_grow_with_calls(name: str, multiple: int, calls: int) -> None:
    model = converted(name, HarmoqConfig(4, 4, "paper"))
    sides = [multiple * step for step in range(2, 8 if multiple == 1 else 4)]
    generator = torch.Generator().manual_seed(0)

    def run(count: int) -> tuple[int, int]:
        for _ in range(count):
            height, width = (sides[int(torch.randint(len(sides), (), generator=generator))] for _ in range(2))
            with torch.no_grad():
                assert model(torch.rand(1, 3, height, width, generator=generator)).shape[-2:] == (height, width)
        gc.collect()
        return sum(issubclass(type(item), Tensor) for item in gc.get_objects()), _resident()

    for height in sides:  # every size once: what is kept for a size is there from then on
        for width in sides:
            model(torch.rand(1, 3, height, width))
    tensors, memory = run(calls // 4)
    later_tensors, later_memory = run(calls)
    assert later_tensors <= tensors
    assert later_memory - memory < 8 * MIB


IMAGES, BAD_SHARE = 100 * FACTOR, 50
"""One image in fifty is bad. `HARMOQ_FUZZ_FACTOR=10` makes it 1,000, of which 20 are bad."""


def _frames(folder: Path) -> set[str]:
    """Write small images in several folders; returns the bad ones."""
    kinds = (lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"text", lambda data: data[::-1])
    rng = np.random.default_rng(0)
    bad: set[str] = set()
    for index in range(IMAGES):
        path = folder / f"{index % 3}" / f"frame{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        if index % BAD_SHARE == BAD_SHARE - 1:
            path.write_bytes(kinds[len(bad) % len(kinds)](path.read_bytes()))
            bad.add(str(path))
    return bad


def _results(folder: Path) -> int:
    return sum(path.suffix == ".png" for path in folder.rglob("*.*"))


@pytest.mark.slow
def test_a_run_that_is_ended_twice_and_continued(tmp_path: Path) -> None:
    bad, out = _frames(tmp_path / "in"), tmp_path / "out"
    safetensors.torch.save_file(state(), tmp_path / "model.safetensors")
    given = ["upscale", str(tmp_path / "model.safetensors"), str(tmp_path / "in"), "-r", "-o", str(out)]
    command = [sys.executable, "-m", "harmoq_ao.cli", "--threads", "1", *given, "--tile", "16", "--overlap", "8"]
    for share in (0.2, 0.6):
        with subprocess.Popen([*command, "--skip-existing"], stderr=subprocess.PIPE, text=True) as run:
            while _results(out) < share * IMAGES:
                assert run.poll() is None, run.stderr
                time.sleep(0.01)
            os.kill(run.pid, signal.SIGTERM)
            _, said = run.communicate()
        assert run.returncode == 128 + signal.SIGTERM, said
        assert "Interrupted by SIGTERM; incomplete outputs were discarded." in said
        assert not list(out.rglob(".*")), "temporary files are left"
        assert _results(out) < IMAGES - len(bad), "it ended before it was killed"
    done = subprocess.run([*command, "--skip-existing"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    reasons = [line for line in done.stderr.splitlines() if "What to do" in line]
    assert {line.partition(": ")[0] for line in reasons} == bad
    assert len(reasons) == len(bad) == IMAGES // BAD_SHARE
    assert "Traceback" not in done.stderr
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) == IMAGES - len(bad)
    assert all(image_size(path) == (128, 128) for path in files)
