"""What all commands share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from harmoq_ao import __version__
from tests.cli.command import fails, harmoq, photograph, succeeds


def test_version_and_help() -> None:
    assert __version__ in succeeds("--version")
    for command in ("demo", "quantize", "evaluate", "upscale", "inspect", "report", "export"):
        assert command in succeeds("--help")
        assert "Usage" in succeeds(command, "--help")


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    result = harmoq("--verbose", "inspect", tmp_path / "none.pth")
    assert result.exit_code == 2
    assert "Traceback" in result.output


def test_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        fails("--threads", 1, "inspect", tmp_path / "none.pth")
        assert torch.get_num_threads() == 1
        fails("--threads", 0, "inspect", tmp_path / "none.pth")
    finally:
        torch.set_num_threads(before)


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("upscale", LONG, "in", "-o", "out"),
        ("upscale", "w4", LONG, "-o", "out"),
        ("upscale", "w4", "in", "-o", LONG),
        ("upscale", "w4", "in", "-o", f"new/{LONG}"),
        ("evaluate", LONG, "in"),
        ("evaluate", "w4", LONG),
        ("evaluate", "w4", "in", "--json", LONG),
        ("inspect", LONG),
        ("report", LONG),
        ("report", "w4", "-o", LONG),
        ("report", "w4", "--images", LONG),
        ("report", "w4", "-o", "none/page.html"),
        ("export", LONG, "m.onnx"),
        ("export", "w4", f"{LONG}.onnx"),
        ("export", "w4", "none/m.onnx"),
        ("quantize", LONG, "out", "--calibration", "in"),
        ("quantize", "w4", "out", "--calibration", LONG),
    ],
    ids=lambda arguments: " ".join(word[:6] for word in arguments),
)
def test_what_the_system_refuses_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    photograph(tmp_path / "in" / "a.png", 12, 12)
    message = fails(*arguments)
    assert "Error:" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_errors_of_the_system_that_no_room_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "secret")

    monkeypatch.setattr(os.path, "isdir", refused)
    message = fails("inspect", "model")
    assert "secret cannot be used. found: Permission denied" in message
