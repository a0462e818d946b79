"""`harmoq inspect`: the sites of a model and their quantization."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

import harmoq_ao
from harmoq_ao.cli.common import KernelDeviceOption, ModelArgument, app, err, out, summary

if TYPE_CHECKING:
    from harmoq_ao import Report, SiteRow


@app.command()
def inspect(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also list sites that stay in float.")] = False,
    device: KernelDeviceOption = "cpu",
) -> None:
    """List the sites of a model and how they are quantized; of a float checkpoint, how they would be."""
    from harmoq_ao.zoo.transformers_models import reads_as_quantized

    with err.status("Reading the model"):
        if reads_as_quantized(model):
            report = harmoq_ao.load_quantized(model).report(device)
            size: int | None = harmoq_ao.folder_bytes(model)
        else:
            report = harmoq_ao.prepare_harmoq(harmoq_ao.open_float(model), harmoq_ao.HarmoqConfig()).report()
            size = None
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    out.print(_site_table(report, every))
    out.print(summary(report), highlight=False)
    for note in report.notes:
        out.print(escape(note), highlight=False)
    if size is not None:
        out.print(f"{size:,} bytes on disk", highlight=False)
    else:
        out.print("A float model, shown as W8A8 with the deploy profile would quantize it.", highlight=False)


def _site_table(report: Report, every: bool) -> Table:
    table = Table(title=escape(report.title), title_justify="left")
    for column in ("site", "kind", "shape", "bits", "range", "joint scale", "SQNR dB", "kernel or reason"):
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
