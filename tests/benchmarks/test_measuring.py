"""Helpers of the benchmarks that only compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.measuring import (
    environment,
    one_line,
    paired_ratio,
    percentiles,
    random_image,
    read_results,
    write_results,
)


def test_percentiles_are_in_milliseconds() -> None:
    assert percentiles([0.001 * i for i in range(1, 100)]) == {"p20_ms": 20.0, "p50_ms": 50.0, "p80_ms": 80.0}


def test_ratios_are_taken_within_rounds() -> None:
    assert paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired_ratio([1.0], [1.0, 2.0])


def test_an_error_fits_in_a_line_and_names_no_folder() -> None:
    error = OSError("\n  cannot open '/opt/some-where/lib/kernels.so', see https://example.org/a/b for 1/2 GB\nmore")
    assert one_line(error) == "OSError: cannot open 'kernels.so', see https://example.org/a/b for 1/2 GB"
    assert one_line(KeyError()) == "KeyError: "
    assert len(one_line(ValueError("x" * 1000))) == 300


def test_images_repeat_by_seed() -> None:
    assert torch.equal(random_image(4, 1), random_image(4, 1))
    assert not torch.equal(random_image(4, 1), random_image(4, 2))


def test_results_are_the_environment_and_a_line_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/opt/some-where/cpu_peers.py", "--set5", "/opt/sets/Set5"])
    found = environment(["torchao", "no-such-package"])
    assert found["command"] == "python -m benchmarks.cpu_peers --set5 Set5"
    assert found["no-such-package"] is None
    assert found["torchao"]
    path, rows = tmp_path / "below" / "a.jsonl", [{"contender": "one", "seconds": [0.1, 2.0]}, {"error": "none"}]
    assert read_results(path) == ({}, [])
    write_results(path, found, rows)
    assert read_results(path) == (found, rows)
    assert len(path.read_text().splitlines()) == 3
