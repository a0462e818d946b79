"""The paper's tables and our ablations: measured, resumable, as CSV, Markdown and a chart.

    python -m harmoq_ao.recipes.tables table1 --output results --benchmark SETS --calibration PHOTOGRAPHS \\
        --scales 2 4 --bits 2 3 4 8 --sets Set5 Set14

`table1` compares methods; `table2` the eight combinations of HarmoQ's three components; `table3` the projections of its
structural residual calibration; `additions` builds HarmoQ up stage by stage, or compares any variations from a file.
Benchmarks and photographs are your own copies. Finished cells are kept below the output folder: the same command after
an interruption, or with more sets, computes what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from harmoq_ao.baselines import BASELINES, GranularDQ
from harmoq_ao.baselines.bits_by_patch import widths_of
from harmoq_ao.common.choices import METHODS
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.presets import HarmonizeSettings
from harmoq_ao.recipes import charts, options
from harmoq_ao.recipes.cells import BY_PATCH, HARMOQ, Value
from harmoq_ao.recipes.documents import Entry, Plan, numbers, provenance, references, to_markdown
from harmoq_ao.recipes.store import write_text
from harmoq_ao.recipes.study import Outcome, Study

Options = Mapping[str, Value]
REFINED = "then refined"
REFINED_ROW = "HarmoQ + refinement"
COMPONENTS = ("src", "hso", "abr")
PROJECTIONS = ("none", "laplacian", "sobel", "dct", "learned", "random", "identity")
ABSOLUTE: Options = {"algorithm": None, "refine": None, "config.relative_maps": False}
BARE: Options = {**ABSOLUTE, "config.joint_scale": "none"}
ALGORITHM: Options = {"refine": None, "algorithm.src": True}
"""Algorithm 1 alone, whatever the preset does."""
ADDITIONS: dict[str, Options] = {
    "MSE bounds": BARE,
    "+ HSO": {**ABSOLUTE, "config.joint_shift": False},
    "+ joint shift": ABSOLUTE,
    "+ relative maps": {"algorithm": None, "refine": None},
    "+ Algorithm 1 (left out below)": ALGORITHM,
    "+ bounds refined": {"refine.rates.scales": 0.0, "refine.rates.weights": 0.0, "refine.rates.rest": 0.0},
    "+ scales": {"refine.rates.weights": 0.0, "refine.rates.rest": 0.0},
    "+ weights": {"refine.rates.rest": 0.0},
    "+ other float parameters": {},
    "+ Algorithm 1 before": {"algorithm.src": True},
}
"""Stages of HarmoQ, each on top of those before it unless it says otherwise, as departures from the preset."""


def title_of(method: str) -> str:
    """A method as tables name it."""
    return "HarmoQ" if method == HARMOQ else BASELINES[method].title


def rows_of(method: str, settings: HarmonizeSettings) -> dict[str, Options]:
    """Rows of a method: HarmoQ has one that runs Algorithm 1 alone beside the one of a preset that refines.

    Granular-DQ has one whose bits belong to patches, as its paper has it, which is no model of fixed width.
    """
    if method == GranularDQ.name:
        return {title_of(method): {}, f"{title_of(method)} by patch (simulated)": {BY_PATCH: True}}
    if method != HARMOQ or settings.refine is None:
        return {title_of(method): {}}
    return {"HarmoQ (Algorithm 1)": ALGORITHM, REFINED_ROW: {}}


def stages_of(settings: HarmonizeSettings) -> str:
    """Which stages the rows of :func:`rows_of` run."""
    before = "" if settings.algorithm is None else "Algorithm 1, "
    return (
        "HarmoQ (Algorithm 1): calibration with closed-form scales and shifts, then SRC, HSO and ABR; nothing is "
        f"learned. {REFINED_ROW}: the same calibration, {before}then {settings.steps} gradient steps."
    )


# --- what the tables show ---------------------------------------------------------------------------------------------


def table1(arguments: argparse.Namespace) -> Plan:
    """Methods by bits and set; the weakest baselines first, HarmoQ last."""
    ordered = [m for m in arguments.methods if m != HARMOQ] + [m for m in arguments.methods if m == HARMOQ]
    (bits, *_), (scale, *_) = arguments.bits, arguments.scales
    settings = options.template(arguments, HARMOQ, scale, bits).settings()
    rows = {label: (m, o) for m in ordered for label, o in rows_of(m, settings).items()}
    entries = references(arguments.scales)
    for widths, label, scale in itertools.product(arguments.bits, rows, arguments.scales):
        method, departures = rows[label]
        if BY_PATCH in departures and len(widths_of(widths[1])) == 1:
            continue  # nothing to trade
        cell = options.template(arguments, method, scale, widths, label).with_options(departures)
        entries.append(Entry(cell.bits, cell.label, cell))
    ours = list(rows)[-1] if HARMOQ in ordered and len(ordered) > 1 else None
    heading = f"Methods, {arguments.profile} profile, preset {arguments.preset}"
    return Plan("table1", heading, arguments.sets, entries, ours, (stages_of(settings),) if REFINED_ROW in rows else ())


def table2(arguments: argparse.Namespace) -> Plan:
    """All combinations of the components; without HSO there is no joint scale at all."""
    variations: dict[str, Options] = {}
    for size in range(len(COMPONENTS) + 1):
        for on in itertools.combinations(COMPONENTS, size):
            switches: dict[str, Value] = {f"algorithm.{name}": name in on for name in COMPONENTS}
            scale: Options = {} if "hso" in on else {"config.joint_scale": "none"}
            label = " + ".join(name.upper() for name in on)
            variations[label or "none (MSE bounds)"] = {**(switches if on else {"algorithm": None}), **scale}
    note = "Components of Algorithm 1 (SRC, HSO, ABR), without refinement of the network unless a column says so."
    return _ablation("table2", "Components of HarmoQ", arguments, variations, note)


def table3(arguments: argparse.Namespace) -> Plan:
    """Projections of SRC; ``none`` leaves SRC out."""
    variations = {name: projection_options(name) for name in arguments.projections}
    note = "Projections of SRC within Algorithm 1 (`none`: without SRC)."
    return _ablation("table3", "Projections of structural residual calibration", arguments, variations, note)


def projection_options(name: str) -> dict[str, Value]:
    """Options of a projection."""
    return {"algorithm.src": False} if name == "none" else {"algorithm.projection": name}


def additions(arguments: argparse.Namespace) -> Plan:
    """Stages on top of each other, or the variations of a file."""
    variations = ADDITIONS if arguments.variations is None else read_variations(arguments.variations)
    title = f"What each stage of HarmoQ adds, {arguments.profile} profile, preset {arguments.preset}"
    entries = _entries(arguments, {"": variations})
    return Plan(arguments.name, arguments.title or title, arguments.sets, entries)


def _ablation(
    name: str, title: str, arguments: argparse.Namespace, variations: Mapping[str, Options], note: str
) -> Plan:
    """Variations of Algorithm 1 alone and, if asked for, with the refinement after it."""
    by_variant = {"": {label: {**chosen, "refine": None} for label, chosen in variations.items()}}
    if arguments.refined:
        by_variant[REFINED] = {label: dict(chosen) for label, chosen in variations.items()}
    title = f"{title}, {arguments.profile} profile, preset {arguments.preset}"
    return Plan(name, title, arguments.sets, _entries(arguments, by_variant), notes=(note,))


def _entries(arguments: argparse.Namespace, by_variant: Mapping[str, Mapping[str, Options]]) -> list[Entry]:
    """References, then every variation of HarmoQ at every width and scale."""
    entries = references(arguments.scales, tuple(by_variant))
    labels = next(iter(by_variant.values()))
    for widths, row, scale, variant in itertools.product(arguments.bits, labels, arguments.scales, by_variant):
        name = ", ".join(filter(None, (row, variant)))
        cell = options.template(arguments, HARMOQ, scale, widths, name).with_options(by_variant[variant][row])
        entries.append(Entry(cell.bits, row, cell, variant))
    return entries


def read_variations(path: Path) -> dict[str, Options]:
    """Named variations from a JSON file: ``{"name": {"refine.lr_weights": 0.0, "algorithm": null}, ...}``.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read", found=str(error), expected="a JSON file of variations") from error
    if not isinstance(found, dict) or not found or not all(isinstance(entry, dict) for entry in found.values()):
        raise ConfigError(f"{path} holds no variations", expected='{"name": {"refine.steps": 100}, ...}')
    return found


# --- the command ------------------------------------------------------------------------------------------------------

_TABLES: dict[str, Callable[[argparse.Namespace], Plan]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "additions": additions,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="harmoq_ao.recipes.tables", description=__doc__.partition("\n")[0])
    commands = top.add_subparsers(dest="table", required=True)
    for name, plan in _TABLES.items():
        command = commands.add_parser(name, help=(plan.__doc__ or "").partition("\n")[0])
        options.add_common(command)
        command.add_argument("--scales", type=int, nargs="+", default=[2])
        widths = ["2", "3", "4", "8"] if name == "table1" else ["2"]
        command.add_argument("--bits", type=options.bits, nargs="+", default=list(map(options.bits, widths)))
        if name == "table1":
            command.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
        if name in ("table2", "table3"):
            command.add_argument("--refined", action="store_true", help="a second column with refinement after it")
        if name == "table3":
            command.add_argument("--projections", nargs="+", choices=PROJECTIONS, default=list(PROJECTIONS))
        if name == "additions":
            command.add_argument("--variations", type=Path, help="JSON file of named variations instead of the stages")
            command.add_argument("--name", default="additions", help="stem of the files")
            command.add_argument("--title", help="heading of the table")
    return top


def write_table(study: Study, plan: Plan, outcome: Outcome, command: str, console: Console) -> pd.DataFrame:
    """CSV, Markdown and chart into the study's folder, and the Markdown on the console."""
    found, folder = numbers(plan, outcome), study.settings.output
    write_text(folder / f"{plan.name}.csv", found.to_csv(index=False, float_format="%.6f", lineterminator="\n"))
    text = to_markdown(plan, found, command, provenance(outcome.results.values()))
    write_text(folder / f"{plan.name}.md", text)
    draw = charts.methods_chart if plan.name == "table1" else charts.rows_chart
    draw(folder / f"{plan.name}.png", found, plan.ours)
    console.print(Markdown(text))
    return found


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Measure a table and write it.

    Returns:
        0, 1 where cells failed, 2 where nothing could be done, 130 where it was interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)

    def measure() -> bool:
        plan = _TABLES[arguments.table](arguments)
        study = options.open_study(arguments)
        outcome = study.run(plan.cells(), arguments.sets)
        write_table(study, plan, outcome, options.command("tables", argv), console or Console())
        return not outcome.failures

    return options.guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
