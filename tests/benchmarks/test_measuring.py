"""Helpers of the benchmarks that only compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.measuring import environment, one_line, paired_ratio, percentiles, random_image, write_json


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


def test_the_environment_is_json(tmp_path: Path) -> None:
    found = environment(["torchao", "no-such-package"])
    assert found["no-such-package"] is None
    assert found["torchao"]
    write_json(tmp_path / "below" / "a.json", found)
    assert json.loads((tmp_path / "below" / "a.json").read_text()) == found
