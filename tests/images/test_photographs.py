"""The photographs that scikit-image carries."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmoq_ao.common.errors import DatasetError
from harmoq_ao.images import CALIBRATION_PHOTOGRAPHS, EVALUATION_PHOTOGRAPHS, load_image, skimage_photographs


def test_photographs_are_in_the_package_and_kept_apart() -> None:
    calibration, evaluation = skimage_photographs("calibration"), skimage_photographs("evaluation")
    assert not set(calibration) & set(evaluation)
    assert [path.name for path in calibration.values()] == list(CALIBRATION_PHOTOGRAPHS)
    assert [path.name for path in evaluation.values()] == list(EVALUATION_PHOTOGRAPHS)
    for path in (*calibration.values(), *evaluation.values()):
        assert min(load_image(path).size) >= 300
    assert sum(not load_image(path).grayscale for path in calibration.values()) >= 5


def test_photographs_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no such split. Found: test. Expected: 'calibration' or 'evaluation'"):
        skimage_photographs("test")  # type: ignore[arg-type]
    monkeypatch.setattr("harmoq_ao.images.photographs.files", lambda _: tmp_path)
    with pytest.raises(DatasetError, match=r"lacks photographs. Found: no astronaut.png, chelsea.png, camera.png in"):
        skimage_photographs("evaluation")
