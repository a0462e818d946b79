"""`harmoq report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import fails, succeeds


def test_report_writes_a_page_of_the_images_it_is_given(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    given = ("report", folder / "w4", "-o", page, "--pictures", 1, "--worst", 1)
    low, high = folder / "set" / "LR_bicubic" / "X2", folder / "set" / "HR"
    printed = succeeds(*given, "--images", low, "--hr", high)
    assert "1 of 2 pictures" in printed
    assert "bicubic" in printed
    text = page.read_text()
    assert text.count('<article class="picture"') == 1
    assert "1 more image was given" in text
    assert "PSNR-Y in dB" in text


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("model.safetensors", (), "not a saved model"),
        ("missing", (), "no such file or folder"),
        ("w4", ("-o", "."), "cannot be written"),
        ("w4", ("-o", "a/b.html"), "cannot be written"),
        ("w4", ("--images", "set/HR/0.png", "--hr", "set/HR"), "one folder"),
        ("w4", ("--images", "nothing"), "does not exist"),
    ],
)
def test_report_says_what_it_cannot_use(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, options: tuple[Any, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    assert message in fails("report", model, "-o", tmp_path / "page.html", *options)
    assert list(tmp_path.iterdir()) == []
