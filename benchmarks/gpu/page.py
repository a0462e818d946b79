"""The tables and charts of what was measured on GPUs, from the committed lines of results.

    python -m benchmarks.gpu.page

Writes the section of README.md between its marks, `benchmarks/results/gpu/gpu.md` with all figures, and the charts
beside it. Of our steps, those of the last measured sources count. Where one of them is wrong, the page says which, and
the README shows no speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import BASE, MAIN, QUICK, is_ours
from benchmarks.gpu.results import FOLDER, STAND_IN, Results
from harmoq_ao.common.errors import InputError
from harmoq_ao.recipes.charts import new_figure, save_figure, styled
from harmoq_ao.recipes.lowering import replaced
from harmoq_ao.recipes.store import write_text

MARK = "<!-- python -m benchmarks.gpu.page -->\n"
NONE = (
    "No GPU results yet: the kernels are compiled and interpreted, never timed. `make bench-gpu` checks them and\n"
    "measures whole models on a GPU, ten minutes at a time ([kernels](docs/kernels.md)).\n"
)
_OURS = ("#c2410c", "#94a3b8")


@dataclass(frozen=True)
class Measured:
    """What one GPU has shown.

    Attributes:
        path: The file of its results.
        about: The last environment.
        rows: By name, the last row of each step under these versions; of ours, from the last sources.
    """

    path: Path
    about: dict[str, Any]
    rows: dict[str, dict[str, Any]]

    @property
    def wrong(self) -> list[str]:
        """Steps of ours that failed."""
        return [name for name, row in self.rows.items() if not row["ok"] and _is_ours(name)]

    @property
    def right(self) -> int:
        """Number of kernels and models that agreed with their references."""
        return sum(row["ok"] for name, row in self.rows.items() if name.startswith(("check/", "agree/")))

    def shapes(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Rows of whole models: by shape, then by contender."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name, row in self.rows.items():
            if name.startswith("model/"):
                _, shape, contender = name.split("/")
                found.setdefault(shape, {})[contender] = row
        order = {name: place for place, name in enumerate(QUICK)}
        return {s: dict(sorted(c.items(), key=lambda item: order.get(item[0], 99))) for s, c in found.items()}


def read(folder: Path) -> list[Measured]:
    """The GPUs of a folder; none where there is no result.

    Raises:
        InputError: Results of the stand-in lie among them.
    """
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = Results(path).rows()
        if any(row.get("gpu") == STAND_IN for row in rows):
            raise InputError("The stand-in's results are none of a GPU", found=path, remedy="remove the file")
        if rows:
            last = {key: rows[-1].get(key) for key in ("gpu", "torch", "triton", "torchao", "cuda", "driver")}
            same = [row for row in rows if all(row.get(key) == value for key, value in last.items())]
            ours = next((row["sources"] for row in reversed(same) if _is_ours(row["step"])), None)
            latest = [row for row in same if not _is_ours(row["step"]) or row["sources"] == ours]
            found.append(Measured(path, last, {row["step"]: row for row in latest}))
    return found


def readme(measured: Sequence[Measured]) -> str:
    """The section of the README, in Markdown."""
    parts = [part for each in measured if (part := _section(each))]
    return "\n".join(parts) if parts else NONE


def _section(each: Measured) -> str:
    rows = each.shapes().get(MAIN.name, {})
    if not any("p50_ms" in row for row in rows.values()):
        return ""
    if each.wrong:
        return (
            f"On {each.about['gpu']}, {len(each.wrong)} steps are wrong ([which]({_page(each)})): no speed is shown.\n"
        )
    head = f"{MAIN.name} on {_machine(each)}; {each.right} checks right, none wrong ([all]({_page(each)})).\n\n"
    chart = f"\n![speed against float32 eager]({each.path.with_suffix('.png').as_posix()})\n"
    return head + table(rows) + chart


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Contenders of one shape, in Markdown; times with three digits, ratios with two decimals."""
    lines = [
        "| | ms | against float32 eager | against bf16 compiled | peak MB | PSNR to float32, dB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    compiled = rows.get("bfloat16 compile, CUDA graphs", {}).get("speed_vs_float32_eager")
    for name, row in rows.items():
        shown = f"**{name}**" if name.startswith("W") else name
        if "p50_ms" not in row:
            lines.append(f"| {shown} | {str(row.get('error', '')).replace('|', chr(92) + '|')} | | | | |")
            continue
        speed = row.get("speed_vs_float32_eager")
        cells = [
            f"{row['p50_ms']:.3g}",
            "" if speed is None else f"{speed:.2f}x",
            "" if speed is None or compiled is None else f"{speed / compiled:.2f}x",
            f"{row['peak_mb']:.0f}" if "peak_mb" in row else "",
            f"{row['psnr_db']:.1f}" if name != BASE and "psnr_db" in row else "",
        ]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def kernels(each: Measured) -> str:
    """Kernels beside their floors, in Markdown."""
    lines = ["| kernel | ms, cold cache | ms, back to back | floor, ms | reached |", "|---|--:|--:|--:|--:|"]
    for name, row in each.rows.items():
        if name.startswith("time/") and "p50_ms" in row:
            floor = (f"{row['floor_ms']:.3g}", f"{100 * row['of_floor']:.0f} %") if "floor_ms" in row else ("", "")
            graph = f"{row['graph_ms']:.3g}" if "graph_ms" in row else ""
            lines.append(f"| {name.removeprefix('time/')} | {row['p50_ms']:.3g} | {graph} | {' | '.join(floor)} |")
    return "\n".join(lines) + "\n"


def page(measured: Iterable[Measured]) -> str:
    """All figures, in Markdown."""
    parts = ["# GPUs\n", "`python -m benchmarks.gpu.page` makes this page of the lines beside it.\n"]
    for each in measured:
        parts.append(
            f"## {each.about['gpu']}\n\n{_machine(each)}; {each.right} checks right, {len(each.wrong)} wrong.\n"
        )
        parts += [f"* WRONG: {name}: {each.rows[name].get('error', 'see its line')}\n" for name in each.wrong]
        parts += [f"### {shape}\n\n{table(rows)}" for shape, rows in each.shapes().items()]
        parts.append(f"### Kernels\n\n{kernels(each)}")
    return "\n".join(parts)


@styled
def chart(each: Measured) -> None:
    """Bars of the speed on the main shape, and time and memory against pixels where sizes were measured."""
    shapes = each.shapes()
    rows = {n: r for n, r in shapes.get(MAIN.name, {}).items() if "speed_vs_float32_eager" in r}
    if rows:
        figure = new_figure(7.0, 0.32 * len(rows) + 0.9)
        axis = figure.subplots()
        names = list(reversed(rows))
        speeds = [rows[name]["speed_vs_float32_eager"] for name in names]
        bars = axis.barh(names, speeds, color=[_OURS[0] if name.startswith("W") else _OURS[1] for name in names])
        axis.bar_label(bars, [f" {speed:.2f}x" for speed in speeds], fontsize=8)
        axis.margins(x=0.15, y=0.02)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(f"speed against float32 eager, {MAIN.name}, {each.about['gpu']}")
        save_figure(figure, each.path.with_suffix(".png"))
    _growth(each, shapes)


def _growth(each: Measured, shapes: dict[str, dict[str, dict[str, Any]]]) -> None:
    sides: dict[str, list[tuple[int, float, float]]] = {}
    for shape, rows in shapes.items():
        model, scale, size, batch = shape.split(" ")
        height, width = map(int, size.split("x"))
        if (model, scale, batch) == (MAIN.model, f"x{MAIN.scale}", "b1") and height == width:
            for name, row in rows.items():
                if "p50_ms" in row and "peak_mb" in row:
                    sides.setdefault(name, []).append((height, row["p50_ms"], row["peak_mb"]))
    several = {name: sorted(points) for name, points in sides.items() if len(points) > 2}
    if not several:
        return
    figure = new_figure(8.4, 3.2)
    for axis, column, label in zip(figure.subplots(1, 2), (1, 2), ("ms", "peak MB"), strict=True):
        for name, points in several.items():
            axis.loglog([point[0] for point in points], [point[column] for point in points], label=name)
        axis.set_xlabel(f"side of the input, pixels, {MAIN.model} x{MAIN.scale}")
        axis.set_ylabel(label)
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, each.path.with_name(f"{each.path.stem}-growth.png"))


def _is_ours(name: str) -> bool:
    peers = name.startswith(("model/", "compile/")) and name.count("/") == 2
    return not peers or is_ours(name.rpartition("/")[2])


def _machine(each: Measured) -> str:
    return ", ".join([each.about["gpu"], *(f"{key} {each.about[key]}" for key in ("torch", "triton", "torchao"))])


def _page(each: Measured) -> str:
    return each.path.with_name("gpu.md").as_posix()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write page, charts and README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args(arguments)
    measured = read(options.results)
    text = readme(measured)
    if measured:
        write_text(options.results / "gpu.md", page(measured))
        for each in measured:
            chart(each)
    write_text(options.readme, replaced(options.readme.read_text(), text, MARK))
    print(text)


if __name__ == "__main__":
    main()
