"""Loaded models: the same bits in a new process, and a typed error for damaged files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.config import HarmoqConfig, SiteRule
from tests.conversion.helpers import CONFIG, SMALL, contents, denied
from tests.models import PER_TOKEN, build, converted, images, run

ROOT = Path(__file__).parents[2]

CASES: list[tuple[str, HarmoqConfig, torch.dtype]] = [
    ("DAT", HarmoqConfig(8, 8), torch.float32),
    ("DAT", CONFIG, torch.float32),
    ("Swin2SR", HarmoqConfig(2, 2), torch.float32),
    ("FDAT", HarmoqConfig(3, 5, "paper", joint_scale="none"), torch.float32),
    ("FDAT", HarmoqConfig(8, 8), torch.bfloat16),
    (SMALL, HarmoqConfig(8, 8, "paper", conv_bits=8), torch.float32),
    (SMALL, HarmoqConfig(4, 32), torch.float32),
    (SMALL, HarmoqConfig(32, 4, storage_dtype="bfloat16"), torch.float32),
    (SMALL, HarmoqConfig(4, 4, matmul_bits=6, rules=[*PER_TOKEN, SiteRule("*.qkv", act_bits=8)]), torch.float32),
]

_LOAD_AND_RUN = """
import sys
import torch
import harmoq_ao as h
torch.set_num_threads({})
for folder in sys.argv[1:]:
    torch.save(h.load_quantized(folder)(torch.load(folder + ".in", weights_only=True)), folder + ".out")
"""


# --- round trips ------------------------------------------------------------------------------------------------------


def test_a_new_process_computes_the_same_bits(tmp_path: Path) -> None:
    image = images(1, (19, 21), seed=77)[0]
    for at, (name, config, dtype) in enumerate(CASES):
        model = converted(name, config, dtype)
        h.save_quantized(model, tmp_path / str(at))
        torch.save(image, tmp_path / f"{at}.in")
        torch.save(run(model, image), tmp_path / f"{at}.expected")
    folders = [str(tmp_path / str(at)) for at in range(len(CASES))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = _LOAD_AND_RUN.format(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", code, *folders], check=True, cwd=ROOT, env=environment, capture_output=True)
    for folder, case in zip(folders, CASES, strict=True):
        actual, expected = (torch.load(f"{folder}.{end}", weights_only=True) for end in ("out", "expected"))
        assert torch.equal(actual, expected), case


@pytest.mark.parametrize(("name", "config", "dtype"), CASES)
def test_everything_about_a_model_survives(name: str, config: HarmoqConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted(name, config, dtype)
    loaded = h.load_quantized(h.save_quantized(model, tmp_path / "m"))
    assert loaded.config == config
    assert loaded.traits == model.traits
    assert loaded.float_dtype == dtype
    assert loaded.kernels() == model.kernels()
    assert loaded.report() == model.report()
    assert str(loaded.report()) == str(model.report())
    assert loaded.report().to_dict() == model.report().to_dict()
    again = h.save_quantized(loaded, tmp_path / "again")
    assert contents(again) == contents(tmp_path / "m")


def test_a_module_of_ones_own_is_loaded_into_a_fresh_instance(tmp_path: Path) -> None:
    model = converted("forms", HarmoqConfig(4, 4, "paper", conv_bits=8))
    h.save_quantized(model, tmp_path / "m")
    with pytest.raises(SavedModelError, match="model="):
        h.load_quantized(tmp_path / "m")
    fresh = build("forms")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(0.5)
    assert torch.equal(run(h.load_quantized(tmp_path / "m", fresh)), run(model))
    assert all(bool((p == 0.5).all()) for p in fresh.parameters())


@pytest.mark.parametrize("other", [nn.Conv2d(3, 3, 1), nn.Identity(), build("linears"), "a model", 3])
def test_a_model_of_another_architecture_is_refused(other: Any, tmp_path: Path) -> None:
    h.save_quantized(converted("forms", CONFIG), tmp_path / "m")
    with pytest.raises(SavedModelError):
        h.load_quantized(tmp_path / "m", other)


class Buffers(nn.Module):
    """A linear, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("exact", torch.tensor([1.0 / 3, 2.0 / 3, 1.0], dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))

    def forward(self, image: Tensor) -> Tensor:
        x = self.proj(image.movedim(1, -1)).movedim(-1, 1)[:, self.order]
        return x * self.exact[:, None, None].float() + torch.exp(self.mask)[:, None, None]


def test_buffers_of_a_module_of_ones_own_are_kept_exactly(tmp_path: Path) -> None:
    model = h.convert_harmoq(h.calibrate(h.prepare_harmoq(Buffers(), CONFIG, images(1)), images(2)))
    h.save_quantized(model, tmp_path / "m")
    fresh = Buffers()
    for buffer in fresh.buffers():
        buffer.zero_()
    loaded = h.load_quantized(tmp_path / "m", fresh)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.buffers(), model.model.buffers(), strict=True))
    assert torch.equal(run(loaded), run(model))


def test_examples_may_be_batches_of_many_crops(tmp_path: Path) -> None:
    model = h.prepare_harmoq(build("linears"), CONFIG, torch.rand(16, 3, 16, 16))
    quantized = h.convert_harmoq(h.calibrate(model, images(2)))
    loaded = h.load_quantized(h.save_quantized(quantized, tmp_path / "m"), build("linears"))
    assert torch.equal(run(loaded), run(quantized))


# --- damage -----------------------------------------------------------------------------------------------------------


def _flipped(content: bytes, data: st.DataObject) -> bytes:
    changed = bytearray(content)
    at = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(64, len(content) - 1))))
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(changed)


def _cut_or_longer(content: bytes, data: st.DataObject) -> bytes:
    kept = data.draw(st.integers(0, len(content) - 1))
    return content[:kept] if data.draw(st.booleans()) else content + content[: kept + 1]


@pytest.mark.parametrize("damage", [_flipped, _cut_or_longer])
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_flipped_bits_and_other_lengths_are_refused(
    suffix: str, damage: Callable[[bytes, st.DataObject], bytes], data: st.DataObject, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True))
    path = next(folder.glob(f"*{suffix}"))
    path.write_bytes(damage(path.read_bytes(), data))
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_missing_file_is_named(suffix: str, folder: Path) -> None:
    next(folder.glob(f"*{suffix}")).unlink()
    with pytest.raises(SavedModelError) as caught:
        h.load_quantized(folder)
    assert caught.value.found


def test_what_is_no_saved_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / ("n" * 400), tmp_path / "\0"):
        with pytest.raises(SavedModelError):
            h.load_quantized(path)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"3", b"{}", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"9" * 10_000]
)
def test_a_config_that_is_none_is_refused(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


def test_unreadable_files_are_a_typed_error(folder: Path) -> None:
    with denied("read_bytes"), pytest.raises(SavedModelError, match="Permission denied"):
        h.load_quantized(folder)
