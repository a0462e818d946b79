"""Two processes find what one finds, and a lost one is told and made up for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmoq_ao.common.distributed import (
    all_gather,
    all_sum,
    is_distributed,
    is_first,
    is_mine,
    launched_by_torchrun,
    world_size,
)
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.quant.observers import OBSERVERS
from tests.common import ranks, work

State = dict[str, Tensor]


def run(task: str, folder: Path, count: int = 2) -> list[int | None]:
    """Exit codes of all ranks of a task."""
    (folder / "store").unlink(missing_ok=True)
    return ranks.run(work.main, count, task, folder)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave that calibrate with every observer, and refine."""
    folder = tmp_path_factory.mktemp("ranks")
    assert run("calibrate", folder) == [0, 0]
    return folder


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_two_ranks_calibrate_as_one(two_ranks: Path, observer: str) -> None:
    prepared, expected = work.calibrated(observer)
    for number in range(2):
        state, known = load(two_ranks / f"{observer}.{number}")
        assert known.keys() == expected.keys()
        exact = [k for k in known if not k.endswith((".edges", ".counts"))]
        assert len(exact) > 10
        for key in exact:
            assert torch.equal(known[key], expected[key]), key
        for key, value in prepared.state_dict().items():
            if observer == "histogram":  # merged up to the width of a bin
                torch.testing.assert_close(state[key], value, rtol=0.02, atol=1e-3)
            else:
                assert torch.equal(state[key], value), key


def test_merged_histograms_lose_no_count(two_ranks: Path) -> None:
    _, expected = work.calibrated("histogram")
    _, known = load(two_ranks / "histogram.0")
    compared = 0
    for key in [k for k in known if k.endswith(".counts")]:
        edges, own = (known[key.replace("counts", "edges")], expected[key.replace("counts", "edges")])
        bin_ = max(float(edges[1] - edges[0]), float(own[1] - own[0]))
        total = float(expected[key].sum())
        assert float(known[key].sum()) == pytest.approx(total, rel=1e-9)
        mean = float(((edges[1:] + edges[:-1]) / 2 * known[key]).sum() / total)
        assert mean == pytest.approx(float(((own[1:] + own[:-1]) / 2 * expected[key]).sum() / total), abs=2 * bin_)
        compared += 1
    assert compared > 3


def test_two_ranks_refine_as_one(two_ranks: Path) -> None:
    prepared, trace = work.refined()
    expected = prepared.state_dict()
    states: list[State] = [load(two_ranks / f"refined.{number}") for number in range(2)]
    for key, value in expected.items():
        assert torch.equal(states[0][key], states[1][key]), key
        torch.testing.assert_close(states[0][key], value, rtol=1e-3, atol=1e-4)
    start, _ = work.calibrated("minmax")
    assert any(not torch.allclose(v, expected[k], rtol=1e-2, atol=1e-3) for k, v in start.state_dict().items())
    found = json.loads((two_ranks / "trace.0").read_text())
    assert found["losses"] == pytest.approx(trace["losses"], rel=1e-4)
    assert [psnr for _, psnr in found["held_out"]] == pytest.approx([psnr for _, psnr in trace["held_out"]], abs=0.01)


def test_a_killed_rank_is_told_and_the_run_resumes(two_ranks: Path, tmp_path: Path) -> None:
    assert run("die", tmp_path) == [work.LOST, 9]
    message = (tmp_path / "error.0").read_text()
    assert "Another rank was lost" in message
    assert "resumes" in message
    assert (tmp_path / "progress.safetensors").exists()
    assert run("refine", tmp_path) == [0, 0]
    resumed, whole = load(tmp_path / "refined.0"), load(two_ranks / "refined.0")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert (tmp_path / "trace.0").read_text() == (two_ranks / "trace.0").read_text()


def test_a_single_process_owns_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched_by_torchrun():
        assert not is_distributed()
        assert is_first()
        assert world_size() == 1
        assert all(is_mine(index) for index in range(5))
        tensor = torch.arange(3.0)
        assert all_sum(tensor) is tensor
        assert all_gather(tensor)[0] is tensor


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "not valid"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "not valid"),
        ({"WORLD_SIZE": "2", "RANK": "0", "HARMOQ_RANK_TIMEOUT": "soon"}, "timeout"),
    ],
)
def test_an_unusable_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    others = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"} if len(variables) > 1 else {}
    for name, value in (variables | others).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), launched_by_torchrun():
        pytest.fail("it went on")
