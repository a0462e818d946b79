"""Tables of a study: entries against benchmark sets as a data frame, as CSV and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harmoq_ao.recipes.cells import HARMOQ, Cell, bicubic_cell, float_cell
from harmoq_ao.recipes.study import Outcome, Result

_VERSIONS = ("harmoq_ao", "torch", "numpy", "python")
_PLACE = ["group", "scale", "set", "variant"]  # where rows compete
_PROTOCOL = (
    "Means of PSNR-Y in dB / SSIM-Y (in brackets: PSNR against the float model's), 8-bit output, whole images, a "
    "border of the scale left out."
)


@dataclass(frozen=True)
class Entry:
    """One cell in its place of a table.

    Args:
        group: Rows of one group (of one bit width) compete; empty for references.
        row: First column.
        cell: What is measured.
        variant: Part of the column besides the set.
    """

    group: str
    row: str
    cell: Cell
    variant: str = ""


@dataclass(frozen=True)
class Plan:
    """What a table shows.

    Args:
        name: Stem of its files.
        title: Heading.
        sets: Benchmark sets.
        entries: All cells, references first.
        ours: Row whose margin over the best baseline of its group is shown, if any.
        notes: Sentences below the title.
    """

    name: str
    title: str
    sets: Sequence[str]
    entries: Sequence[Entry]
    ours: str | None = None
    notes: Sequence[str] = ()

    def cells(self) -> list[Cell]:
        """Everything that has to be measured, references first."""
        return list(dict.fromkeys(entry.cell for entry in self.entries))


def references(scales: Sequence[int], variants: Sequence[str] = ("",)) -> list[Entry]:
    """The rows bicubic and float."""
    makers = {"bicubic": bicubic_cell, "float": float_cell}
    return [Entry("", row, make(s), v) for row, make in makers.items() for s in scales for v in variants]


def numbers(plan: Plan, outcome: Outcome) -> pd.DataFrame:
    """Every number of the table: one line for each entry and set, in the columns of the CSV.

    Lines of failed cells hold NaN. ``drop_*`` are against the float model, ``best_*`` mark the best of a group and
    column where there are several, ``margin_psnr`` is on the lines of the plan's own row.
    """
    frame = pd.DataFrame([_line(plan, entry, name, outcome) for entry in plan.entries for name in plan.sets])
    frame = frame.astype({"weight_bits": "Int64", "act_bits": "Int64"})
    rivals = frame[(frame["group"] != "") & frame["psnr_y"].notna()]
    places = rivals.groupby(_PLACE)
    for name in ("psnr", "ssim"):
        best = (rivals[f"{name}_y"] == places[f"{name}_y"].transform("max")) & (places["row"].transform("size") > 1)
        frame[f"best_{name}"] = best.reindex(frame.index, fill_value=False).astype(int)
    others = rivals[(rivals["row"] != plan.ours) & (rivals["method"] != HARMOQ)]  # not another row of ours
    others = others.sort_values("psnr_y", ascending=False, kind="stable")
    strongest = others.drop_duplicates(_PLACE).set_index(_PLACE)[["row", "psnr_y"]]
    frame = frame.join(strongest.set_axis(["strongest_baseline", "strongest_psnr"], axis=1), on=_PLACE)
    own = (frame["row"] == plan.ours) & frame["psnr_y"].notna()
    frame["strongest_baseline"] = frame["strongest_baseline"].where(own)
    frame["margin_psnr"] = (frame["psnr_y"] - frame.pop("strongest_psnr")).where(own)
    seconds = ["seconds_quantize", "seconds_evaluate"]
    return frame[[*frame.columns.drop(seconds), *seconds]]


def _line(plan: Plan, entry: Entry, set_name: str, outcome: Outcome) -> dict[str, Any]:
    cell, failed = entry.cell, Result(math.nan, math.nan, seconds_quantize=math.nan, seconds_evaluate=math.nan)
    found = outcome.get(cell, set_name) or failed
    exact = outcome.get(float_cell(cell.scale), set_name) or failed
    made = not cell.is_reference
    return {
        "table": plan.name,
        "group": entry.group,
        "row": entry.row,
        "variant": entry.variant,
        "method": cell.method,
        "scale": cell.scale,
        "weight_bits": cell.weight_bits if made else None,
        "act_bits": cell.act_bits if made else None,
        "profile": cell.profile if made else None,
        "preset": cell.preset if made else None,
        "set": set_name,
        "psnr_y": found.psnr_y,
        "ssim_y": found.ssim_y,
        "drop_psnr": exact.psnr_y - found.psnr_y,
        "drop_ssim": exact.ssim_y - found.ssim_y,
        "seconds_quantize": found.seconds_quantize,
        "seconds_evaluate": found.seconds_evaluate,
    }


# --- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(plan: Plan, frame: pd.DataFrame, command: str, origin: str) -> str:
    """Title, command, provenance, and a table for each scale."""
    parts = [f"# {plan.title}", f"```\n{command}\n```", origin, *plan.notes, _PROTOCOL]
    for scale, part in frame.groupby("scale", sort=False):
        parts += [f"## x{scale}", markdown_table(grid(plan, part), left=2)]
    return "\n\n".join(parts) + "\n"


def grid(plan: Plan, frame: pd.DataFrame) -> pd.DataFrame:
    """One scale's table as text: a column for each set and variant, the best numbers in bold, margins below a group."""
    heading = frame["set"].str.cat(frame["variant"], sep=", ").str.removesuffix(", ")
    frame = frame.assign(heading=heading, text=frame.apply(_text, axis=1))
    headings = [", ".join(filter(None, (s, v))) for s in plan.sets for v in frame["variant"].unique()]
    rows: list[dict[str, str]] = []
    for group, rivals in frame.groupby("group", sort=False):
        for row, line in rivals.groupby("row", sort=False):
            rows.append({"bits": str(group), "": str(row), **dict(zip(line["heading"], line["text"], strict=True))})
        own = rivals[rivals["margin_psnr"].notna()]
        margins = {e["heading"]: f"{e['margin_psnr']:+.3f} ({e['strongest_baseline']})" for _, e in own.iterrows()}
        if margins:
            rows.append({"bits": str(group), "": f"{plan.ours} over the strongest baseline", **margins})
    return pd.DataFrame(rows, columns=["bits", "", *headings]).fillna("")


def _text(entry: pd.Series) -> str:
    if math.isnan(entry["psnr_y"]):
        return "failed"
    psnr, ssim = f"{entry['psnr_y']:.3f}", f"{entry['ssim_y']:.4f}"
    psnr, ssim = f"**{psnr}**" if entry["best_psnr"] else psnr, f"**{ssim}**" if entry["best_ssim"] else ssim
    compared = entry["group"] and not math.isnan(entry["drop_psnr"])
    return f"{psnr} / {ssim}" + (f" ({-entry['drop_psnr']:+.3f})" if compared else "")


def markdown_table(frame: pd.DataFrame, left: int = 1) -> str:
    """A data frame of text as Markdown, its first columns left-aligned, the others right-aligned."""
    align = ["---"] * left + ["--:"] * (len(frame.columns) - left)
    lines = [list(frame.columns), align, *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def provenance(results: Iterable[Result]) -> str:
    """Versions, machines and what was simulated, over all results of a table; no date, no host names."""
    results = list(results)

    def distinct(values: Iterable[Any]) -> str:
        return " and ".join(dict.fromkeys(str(value) for value in values if value))

    versions = ", ".join(f"{name} {distinct(r.environment.get(name) for r in results)}" for name in _VERSIONS)
    machines = (distinct(r.environment.get(name) for r in results) for name in ("cpu", "gpu"))
    text = f"Versions: {versions}. Machine: {'; '.join(filter(None, machines))}."
    if measured := distinct(r.measured for r in results):
        text += f" Quantized models were measured as {measured}; "
        text += "simulation and integers agree up to the order of float additions."
    return text
