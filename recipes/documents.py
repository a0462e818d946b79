"""Tables of a study: rows of cells against benchmark sets, as CSV, as Markdown and on the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from harmoq_ao.common.output import atomic_write
from harmoq_ao.recipes.cells import Cell, bicubic_cell, float_cell
from harmoq_ao.recipes.study import Outcome

_MISSING = "failed"
_VERSIONS = ("harmoq_ao", "torch", "numpy", "python")
_MACHINE = ("cpu", "gpu")
_EQUAL = "simulation and integers agree up to the order of float additions"


@dataclass(frozen=True)
class Column:
    """One benchmark set at one scale, with what `variant` of each row's cell is measured there."""

    set_name: str
    scale: int
    variant: str = ""

    @property
    def heading(self) -> str:
        """``Set5, refined``; the scale heads the whole table."""
        return ", ".join(part for part in (self.set_name, self.variant) if part)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        group: Rows of one group (of one bit width) compete; an empty group is for references.
        label: First column.
        cells: What is measured, by scale and variant.
    """

    group: str
    label: str
    cells: dict[tuple[int, str], Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a table shows.

    Args:
        name: Stem of its files.
        title: Heading.
        columns: All columns, of all scales.
        rows: All rows; references come first.
        ours: Label of the row whose margin over the best other row of its group is shown, if any.
        notes: Sentences below the title.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    ours: str | None = None
    notes: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """Everything that has to be measured, references first."""
        return list(dict.fromkeys(cell for row in self.rows for cell in row.cells.values()))

    def scales(self) -> list[int]:
        """Scales in order of appearance."""
        return list(dict.fromkeys(column.scale for column in self.columns))


@dataclass
class Entry:
    """One measured number of a table.

    Args:
        row: Its row.
        column: Its column.
        cell: What was measured.
        psnr_y: Mean in dB; NaN where the cell failed.
        ssim_y: Mean; NaN where the cell failed.
        drop_psnr: Below the float model, in dB.
        drop_ssim: Below the float model.
        best_psnr: Best of its group and column.
        best_ssim: Likewise.
        seconds: Of quantizing and of measuring.
    """

    row: Row
    column: Column
    cell: Cell
    psnr_y: float = math.nan
    ssim_y: float = math.nan
    drop_psnr: float = math.nan
    drop_ssim: float = math.nan
    best_psnr: bool = False
    best_ssim: bool = False
    seconds: tuple[float, float] = (math.nan, math.nan)


@dataclass(frozen=True)
class Margin:
    """How far a row is ahead of the best other one of its group: ``strongest`` and the difference in dB."""

    group: str
    column: Column
    strongest: str
    psnr_y: float


def references(scales: Sequence[int], variants: Sequence[str] = ("",)) -> tuple[Row, Row]:
    """The rows bicubic and float."""
    bicubic = {(scale, variant): bicubic_cell(scale) for scale in scales for variant in variants}
    exact = {(scale, variant): float_cell(scale) for scale in scales for variant in variants}
    return Row("", "bicubic", bicubic), Row("", "float", exact)


def entries(plan: Plan, outcome: Outcome) -> list[Entry]:
    """Every number of the table, row by row."""
    found = []
    for row in plan.rows:
        for column in plan.columns:
            cell = row.cells.get((column.scale, column.variant))
            if cell is not None:
                found.append(_entry(row, column, cell, outcome))
    _mark_best(found)
    return found


def _entry(row: Row, column: Column, cell: Cell, outcome: Outcome) -> Entry:
    result = outcome.get(cell, column.set_name)
    if result is None:
        return Entry(row, column, cell)
    entry = Entry(row, column, cell, result.psnr_y, result.ssim_y)
    exact = outcome.get(float_cell(column.scale), column.set_name)
    if exact is not None:
        entry.drop_psnr, entry.drop_ssim = exact.psnr_y - result.psnr_y, exact.ssim_y - result.ssim_y
    seconds = result.record["seconds"]
    entry.seconds = seconds["quantize"], seconds["evaluate"]
    return entry


def _mark_best(found: Sequence[Entry]) -> None:
    for key in {(entry.row.group, entry.column) for entry in found if entry.row.group}:
        rivals = [e for e in found if (e.row.group, e.column) == key and not math.isnan(e.psnr_y)]
        if len(rivals) < 2:
            continue
        psnr, ssim = max(e.psnr_y for e in rivals), max(e.ssim_y for e in rivals)
        for entry in rivals:
            entry.best_psnr, entry.best_ssim = entry.psnr_y == psnr, entry.ssim_y == ssim


def margins(plan: Plan, found: Sequence[Entry]) -> list[Margin]:
    """For each group and column, how far the plan's own row is ahead of the best other one (negative: behind)."""
    result = []
    for key in dict.fromkeys((entry.row.group, entry.column) for entry in found if entry.row.group):
        rivals = [e for e in found if (e.row.group, e.column) == key and not math.isnan(e.psnr_y)]
        own = next((e for e in rivals if e.row.label == plan.ours), None)
        others = [e for e in rivals if e.row.label != plan.ours]
        if own is not None and others:
            best = max(others, key=lambda e: e.psnr_y)
            result.append(Margin(*key, best.row.label, own.psnr_y - best.psnr_y))
    return result


# --- CSV --------------------------------------------------------------------------------------------------------------


def to_csv(plan: Plan, found: Sequence[Entry]) -> str:
    """One line for each number, with margins on the lines of the plan's own row."""
    ahead = {(m.group, m.column): m for m in margins(plan, found)}
    header = "table group row variant method scale weight_bits act_bits profile preset set psnr_y ssim_y drop_psnr"
    header += " drop_ssim best_psnr best_ssim strongest_baseline margin_psnr seconds_quantize seconds_evaluate"
    lines: list[Sequence[object]] = [header.split()]
    for e in found:
        margin = ahead.get((e.row.group, e.column)) if e.row.label == plan.ours else None
        made = ("", "", "", "") if e.cell.is_reference else _making(e.cell)
        line: list[object] = [plan.name, e.row.group, e.row.label, e.column.variant, e.cell.method, e.column.scale]
        line += [*made, e.column.set_name, _number(e.psnr_y), _number(e.ssim_y), _number(e.drop_psnr)]
        line += [_number(e.drop_ssim), int(e.best_psnr), int(e.best_ssim)]
        line += ["", ""] if margin is None else [margin.strongest, _number(margin.psnr_y)]
        lines.append([*line, *map(_number, e.seconds)])
    return csv_text(lines)


def _making(cell: Cell) -> tuple[object, ...]:
    return cell.weight_bits, cell.act_bits, cell.profile, cell.preset


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Lines as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


# --- Markdown and the terminal ----------------------------------------------------------------------------------------


def to_markdown(plan: Plan, found: Sequence[Entry], command: str, provenance: str) -> str:
    """Title, command, provenance, and a table for each scale."""
    parts = [f"# {plan.title}", f"```\n{command}\n```", provenance, *plan.notes]
    parts.append(
        "Means of PSNR-Y in dB / SSIM-Y (in brackets: PSNR against the float model's), 8-bit output, whole images, a "
        "border of the scale left out."
    )
    for scale in plan.scales():
        header, rows = grid(plan, found, scale, "**{}**")
        align = ["---", "---", *["--:"] * (len(header) - 2)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, align, *rows)]
        parts += [f"## x{scale}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def to_rich(plan: Plan, found: Sequence[Entry], scale: int) -> Table:
    """The table of one scale for the terminal."""
    header, rows = grid(plan, found, scale, "[bold]{}[/]", escape)
    table = Table(title=escape(f"{plan.title}, x{scale}"), title_justify="left")
    for index, heading in enumerate(header):
        table.add_column(escape(heading), justify="left" if index < 2 else "right", overflow="fold")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and row[0] and before[0] != row[0]:
            table.add_section()
        table.add_row(*row)
    return table


def grid(
    plan: Plan, found: Sequence[Entry], scale: int, bold: str, quote: Any = str
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one scale's table as text, the best numbers set in `bold`."""
    columns = [column for column in plan.columns if column.scale == scale]
    by_place = {(id(e.row), e.column): e for e in found}
    ahead = {(m.group, m.column): m for m in margins(plan, found)} if plan.ours else {}
    rows: list[list[str]] = []
    for index, row in enumerate(plan.rows):
        cells = [_text(by_place.get((id(row), column)), bold) for column in columns]
        rows.append([quote(row.group), quote(row.label), *cells])
        last = index + 1 == len(plan.rows) or plan.rows[index + 1].group != row.group
        own = [ahead.get((row.group, column)) for column in columns]
        if last and any(own):
            texts = ["" if m is None else f"{m.psnr_y:+.3f} ({quote(m.strongest)})" for m in own]
            rows.append([quote(row.group), quote(f"{plan.ours} over the strongest baseline"), *texts])
    return ["bits", "", *(column.heading for column in columns)], rows


def _text(entry: Entry | None, bold: str) -> str:
    if entry is None:
        return ""
    if math.isnan(entry.psnr_y):
        return _MISSING
    psnr, ssim = f"{entry.psnr_y:.3f}", f"{entry.ssim_y:.4f}"
    psnr, ssim = bold.format(psnr) if entry.best_psnr else psnr, bold.format(ssim) if entry.best_ssim else ssim
    drop = "" if entry.cell.is_reference or math.isnan(entry.drop_psnr) else f" ({-entry.drop_psnr:+.3f})"
    return f"{psnr} / {ssim}{drop}"


# --- provenance -------------------------------------------------------------------------------------------------------


def provenance(records: Iterable[dict[str, Any]]) -> str:
    """Versions, machines and what was simulated, over all records of a table; no date, no names."""
    records = list(records)
    environments = [record["environment"] for record in records]
    versions = [f"{name} {_distinct(e.get(name) for e in environments)}" for name in _VERSIONS]
    machines = [_distinct(e.get(name) for e in environments) for name in _MACHINE]
    measured = _distinct(r["measured"] for r in records if r["cell"]["method"] not in ("float", "bicubic"))
    machine = "; ".join(m for m in machines if m)
    text = f"Versions: {', '.join(versions)}. Machine: {machine}."
    if measured:
        text += f" Quantized models were measured as {measured}; {_EQUAL}."
    return text


def _distinct(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(str(value) for value in values if value is not None))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())
