"""Launch configurations on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harmoq_ao.triton_kernels import tuning
from harmoq_ao.triton_kernels.tuning import Config


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU/80 GB")


def test_without_a_gpu_the_default_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.save({tuning.key("mlp", Config(4, 2, {"BLOCK_M": 64})): Config(8, 3, {"BLOCK_M": 128})})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.default("mlp", BLOCK_M=64) == Config(4, 2, {"BLOCK_M": 64})


def test_what_was_saved_is_found_for_the_same_kernel_and_blocks_only() -> None:
    best = Config(8, 3, {"BLOCK_M": 128})
    tuning.save({tuning.key("mlp", Config(4, 2, {"BLOCK_M": 64})): best})
    assert tuning.default("mlp", BLOCK_M=64) == best
    assert tuning.default("mlp", BLOCK_M=32) == Config(4, 2, {"BLOCK_M": 32})
    assert tuning.default("other", BLOCK_M=64) == Config(4, 2, {"BLOCK_M": 64})
    assert "/" not in tuning.path().name.removesuffix(".json")


def test_tuning_keeps_the_fastest_and_skips_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda run: run())
    start, slow, fast = Config(blocks={"B": 1}), Config(blocks={"B": 2}), Config(blocks={"B": 3})

    def run(config: Config) -> float:
        if config == slow:
            raise RuntimeError("out of shared memory")
        return 1.0 if config == fast else 2.0

    assert tuning.tune("mlp", start, [slow, fast], run) == fast
    assert tuning.default("mlp", B=1) == fast


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"a": 3}', '{"a": {"num_warps": "x", "num_stages": 1, "blocks": {}}}']
)
def test_a_damaged_file_is_ignored_with_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    tuning.path().parent.mkdir(parents=True)
    tuning.path().write_text(text)
    assert tuning.default("mlp", BLOCK_M=64) == Config(4, 2, {"BLOCK_M": 64})
    assert "damaged" in caplog.text


def test_a_failed_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.save({"a": Config()})
    before = tuning.path().read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.save({"b": Config()})
    assert tuning.path().read_text() == before
    assert list(tuning.path().parent.iterdir()) == [tuning.path()]
