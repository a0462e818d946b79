"""What all commands share."""

from __future__ import annotations

from pathlib import Path

import torch

from harmoq_ao import __version__
from tests.cli.command import fails, harmoq, succeeds


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
