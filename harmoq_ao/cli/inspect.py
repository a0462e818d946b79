"""`harmoq inspect`: what of a model is quantized, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from harmoq_ao.cli.common import (
    ModelArgument,
    app,
    err,
    out,
    summary,
)
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.load import load_quantized
from harmoq_ao.conversion.save import folder_bytes
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.runtime.upscaler import open_float
from harmoq_ao.sites.report import Report, SiteRow


@app.command()
def inspect(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also list what stays in float.")] = False,
    device: Annotated[str, typer.Option(help="Whose kernels to name: cpu or cuda (which need not be there).")] = "cpu",
) -> None:
    """What of a model is quantized and how; of a float checkpoint, which sites it has."""
    with err.status("Reading the model"):
        if Path(model).is_dir():
            report = load_quantized(model).report(device)
            size: int | None = folder_bytes(model)
        else:
            report = prepare_harmoq(open_float(model), HarmoqConfig()).report()
            size = None
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    out.print(_site_table(report, every))
    out.print(summary(report), highlight=False)
    if size is not None:
        out.print(f"{size:,} bytes on disk", highlight=False)
    else:
        out.print("A float model, shown as W8A8 of the deploy profile would quantize it.", highlight=False)


def _site_table(report: Report, every: bool) -> Table:
    table = Table(title=escape(report.title), title_justify="left")
    for column in ("site", "kind", "shape", "bits", "bounds", "joint scale", "SQNR dB", "kernel or reason"):
        table.add_column(column, overflow="fold")
    for row in report.rows:
        if every or row.quantized:
            table.add_row(*map(escape, _row_cells(row)), style=None if row.quantized else "dim")
    return table


def _row_cells(row: SiteRow) -> tuple[str, ...]:
    bounds = f"{row.bounds[0]:.3g} .. {row.bounds[1]:.3g}" if isinstance(row.bounds, tuple) else row.bounds or ""
    joint = "" if row.joint_scale is None else f"{row.joint_scale[0]:.3g} .. {row.joint_scale[1]:.3g}"
    return (
        row.name,
        row.kind,
        "x".join(map(str, row.shape)),
        f"W{row.weight_bits}A{row.act_bits}" if row.quantized else "float",
        bounds,
        joint,
        "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
        str(row.reason or row.kernel or ""),
    )
