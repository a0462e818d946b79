"""The command `harmoq` in this process, and pictures for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from harmoq_ao.cli import app, common

#: 4 bits on two small crops, without optimization.
QUICK = ("--weight-bits", 4, "--act-bits", 4, "--crops", 2, "--crop-size", 16, "--preset", "none")


def harmoq(*arguments: object) -> Result:
    """Run a command, on a terminal wide enough for long paths."""
    widths = common.out.width, common.err.width
    common.out.width = common.err.width = 400
    try:
        result: Any = CliRunner().invoke(app, [str(a) for a in arguments])
    finally:
        common.out.width, common.err.width = widths
    return result


def succeeds(*arguments: object) -> str:
    """What a command prints that must succeed."""
    result = harmoq(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object, code: int = 2) -> str:
    """What a command prints that must fail, without a traceback."""
    result = harmoq(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def photograph(path: Path, height: int = 40, width: int = 48, mode: str = "RGB", seed: int = 0) -> Path:
    """Write a smooth random picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 4), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path
