"""Check and measure everything on the GPU that is here; see the package.

    python -m benchmarks.gpu --quick
    python -m benchmarks.gpu --full --chunk 2      # or the same command again and again, until nothing is left

Each step runs in a process of its own, and its result is a line of the output before the next one begins. Steps whose
result is there, from this GPU, these versions and these sources, are not done again; ``--retry`` repeats those that
failed. Returns 0 where all that was asked for is done and right, 1 where something of ours is wrong, 2 where there is
no GPU, and 3 where time ran out: run it again.

Without a GPU, ``TRITON_INTERPRET=1`` runs every step on tiny problems in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu import plan
from benchmarks.gpu.plan import Step
from benchmarks.gpu.problems import checks, floor, sanitized, timings
from benchmarks.gpu.processes import Runner
from benchmarks.gpu.results import ROOT, Results, finite, path_for, sources
from benchmarks.gpu.stand_in import is_stand_in
from benchmarks.gpu.work import perform, sanitizer

DEVICE = Step("device/", 20, 120)
WORK = Path("build/bench-gpu")
_SAME = ("gpu", "torch", "triton", "torchao", "cuda")
"""What has to be as it was for a result to stand: chunks may run on several machines with the same GPU."""


def steps_of(options: argparse.Namespace, jobs: int) -> list[Step]:
    """What is asked for."""
    tiny = is_stand_in()
    lists = list(checks(tiny)), list(timings(tiny)), sanitized(tiny) if sanitizer() and not tiny else []
    steps = (plan.full if options.full else plan.quick)(*lists, tiny=tiny)
    if options.only:
        steps = [step for step in steps if any(part in step.name for part in options.only)]
    if options.chunk is not None:
        parts = plan.chunks(steps, options.budget, jobs)
        steps = parts[options.chunk - 1] if options.chunk <= len(parts) else []
    return steps


def environment(options: argparse.Namespace) -> tuple[dict[str, Any], Runner]:
    """The device, and what runs steps on it: by forking, or where a GPU cannot be used that way, by starting anew."""
    found: dict[str, Any] = {}
    for start in ("forkserver", "spawn"):
        runner = Runner(partial(perform, work=options.work / "models"), options.work / "logs", start)
        ((_, found),) = runner.run([DEVICE], 1, time.monotonic() + DEVICE.limit + 1)
        if found["ok"]:
            break
    if not found["ok"]:
        print(f"{found['error']}\nSee {options.work / 'logs'}.", file=sys.stderr)
        raise SystemExit(2)
    return {key: value for key, value in found.items() if key not in ("ok", "wall_s")}, runner


def run(options: argparse.Namespace) -> int:
    """Do what is missing and say what is wrong; returns the status."""
    began = time.monotonic()
    steps = steps_of(options, options.jobs)
    about, runner = environment(options)
    results = Results(path_for(about["gpu"], options.output))
    versions = {ours: sources(ours) for ours in (True, False)}
    rows = {step.name: row for step in steps if (row := _known(results, about, step, versions)) is not None}
    if options.retry:
        rows = {name: row for name, row in rows.items() if row["ok"]}
    print(f"{about['gpu']}: {len(steps)} steps, {len(rows)} done before; results in {results.path}", flush=True)
    missing = [step for step in steps if step.name not in rows]
    for together, part in groupby(missing, key=lambda step: step.together):
        for step, found in runner.run(list(part), options.jobs if together else 1, began + options.budget):
            row = {"step": step.name, "sources": versions[step.ours], **found}
            if step.kind == "time":
                row |= floor(row, _latest(results, "time/device"))
            results.add(about, row)
            rows[step.name] = row
            print(_line(row, step.ours, began), flush=True)
    return _summary(steps, rows, options)


def _known(
    results: Results, about: dict[str, Any], step: Step, versions: dict[bool, str]
) -> dict[str, Any] | None:  # fmt: skip
    """The last result of a step on this device, of these sources."""
    same = {key: about.get(key) for key in _SAME} | {"step": step.name, "sources": versions[step.ours]}
    fits = [row for row in results.rows() if all(row.get(key) == value for key, value in same.items())]
    return fits[-1] if fits else None


def _latest(results: Results, name: str) -> dict[str, Any]:
    return next((row for row in reversed(results.rows()) if row["step"] == name), {})


def _line(row: dict[str, Any], ours: bool, began: float) -> str:
    mark = "ok    " if row["ok"] else "WRONG " if ours else "failed"
    shown = {key: value for key, value in row.items() if key not in ("step", "sources", "ok", "wall_s")}
    text = " ".join(f"{key}={_short(value)}" for key, value in shown.items())
    return f"{time.monotonic() - began:6.1f} s {mark} {row['step']}: {text}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _summary(steps: Sequence[Step], rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> int:
    wrong = [step.name for step in steps if step.ours and step.name in rows and not rows[step.name]["ok"]]
    left = [step.name for step in steps if step.name not in rows]
    failed = [step.name for step in steps if not step.ours and step.name in rows and not rows[step.name]["ok"]]
    for title, names in (("WRONG", wrong), ("failed, of other libraries", failed), ("left for the next run", left)):
        if names:
            print(f"{title} ({len(names)}): {'; '.join(names)}")
    if wrong:
        print(f"What they printed is in {options.work / 'logs'}.")
    return 1 if wrong else 3 if left else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    parser.add_argument("--quick", action="store_true", help="kernels and the main comparison; without --full, too")
    how.add_argument("--full", action="store_true", help="all bits, models, sizes and batches as well")
    how.add_argument("--one", metavar="STEP", help="do one step in this process and print its result")
    how.add_argument("--list", action="store_true", help="print the steps of --full in chunks, and do nothing")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no step is begun or goes on")
    parser.add_argument("--chunk", type=int, help="only this part of the steps, from 1, each for one budget")
    parser.add_argument("--only", nargs="*", help="only steps whose names contain one of these")
    parser.add_argument("--retry", action="store_true", help="repeat steps that failed")
    parser.add_argument("--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 1)))
    parser.add_argument("--output", type=Path, help="default: a file named after the GPU")
    parser.add_argument("--work", type=Path, default=WORK, help="saved models and logs")
    options = parser.parse_args(arguments)
    if options.one:
        row = perform(Step(options.one), options.work / "models")
        print(json.dumps(finite({"ok": True} | row)))
        return 0 if row.get("ok", True) else 1
    if options.list:
        options.full = True
        for number, part in enumerate(plan.chunks(steps_of(options, options.jobs), options.budget, options.jobs), 1):
            print(f"chunk {number}", *(f"  {step.name} ({step.seconds:.0f} s)" for step in part), sep="\n")
        return 0
    return run(options)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
