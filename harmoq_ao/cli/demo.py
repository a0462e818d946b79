"""`harmoq demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harmoq_ao.cli.common import app, out


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the picture, the saved models and results.json.")] = Path(
        "demo_output"
    ),
) -> None:
    """Quantize a pretrained DAT-light x2 to 8 and 4 bits, compare HarmoQ with MinMax and DOBI, and draw a picture."""
    from harmoq_ao.recipes.demo import run_demo

    run_demo(output, console=out)
