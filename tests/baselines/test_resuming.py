"""A baseline that is killed goes on from its progress file, and ends where an uninterrupted run does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.baselines import BASELINES
from harmoq_ao.baselines.brecq import blocks
from harmoq_ao.common.errors import CheckpointError
from harmoq_ao.config import HarmoqConfig
from tests.baselines.helpers import applied
from tests.harmonization.helpers import DyingLearner, KilledError

CONFIG = HarmoqConfig(3, 3, "paper")
STEPS = 16


def learned(method: str, checkpoint: Path | None = None, config: HarmoqConfig = CONFIG) -> h.PreparedModel:
    return applied(method, "SwinIR/light", config, steps=STEPS, count=2, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("method", "killed_at", "left"),
    [("2dquant", 12, 6), ("condiquant", 12, 6), ("pams", 12, 6), ("dbdc-pac", 13, 12), ("brecq", 21, None)],
)
def test_kill_and_resume_equals_an_uninterrupted_run(
    method: str, killed_at: int, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress is saved eight times in a run; DBDC+Pac repeats its first half, BRECQ goes on from a whole block."""
    whole = learned(method)
    killed = DyingLearner(monkeypatch, at=killed_at)
    file = tmp_path / "progress.safetensors"
    with pytest.raises(KilledError):
        learned(method, file)
    assert file.exists()
    resumed = learned(method, file)
    left = STEPS * (len(blocks(whole)) - killed_at // STEPS) if left is None else left
    assert killed.count == killed_at + left
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


def test_where_nothing_comes_after_activations_their_progress_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DBDC+Pac learns no ranges of 8-bit weights."""
    config = HarmoqConfig(8, 3, "paper")
    killed = DyingLearner(monkeypatch, at=12)
    with pytest.raises(KilledError):
        learned("dbdc-pac", file := tmp_path / "progress.safetensors", config)
    learned("dbdc-pac", file, config)
    assert killed.count == 12 + 6


@pytest.mark.parametrize("other", ["condiquant", "brecq"])
def test_progress_of_another_method_is_refused(other: str, tmp_path: Path) -> None:
    learned("2dquant", file := tmp_path / "progress.safetensors")
    assert BASELINES[other].observer == BASELINES["2dquant"].observer, "else the configuration tells them apart"
    with pytest.raises(CheckpointError, match="other work") as caught:
        learned(other, file)
    assert f"method: '2dquant' in the file, '{other}' now" in str(caught.value.found)
