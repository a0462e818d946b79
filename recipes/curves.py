"""Traces of harmonization as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from harmoq_ao.recipes.drawing import Curve

_TINY = 1e-30
_UPDATES = "updates of the bounds; median over the sites"
_STAGES = "0 calibrated, 1 SRC and HSO, then updates; median over the sites"


def convergence_curves(label: str, trace: Mapping[str, Any]) -> list[Curve]:
    """Curves of one model.

    Of Algorithm 1 the medians over the sites: the objective that would be kept if it ended there, relative to that of
    the calibrated site, and by update of the bounds the imbalance of the operands' shares of the error,
    ``|left - right| / (left + right)``. A site that stopped early keeps its last value. Of the refinement the training
    loss, averaged over a fortieth of the steps, and the fidelity to the float network on the held-out crops.

    Args:
        label: Name of the model.
        trace: What ``HarmonizeTrace.to_dict`` returns.
    """
    algorithm, refinement = trace.get("algorithm") or {}, trace.get("refine") or {}
    curves = [*_algorithm_curves(label, algorithm.get("sites", ()))]
    losses = refinement.get("losses", [])
    if losses:
        steps, means = _averaged(losses, max(1, len(losses) // 40))
        curves.append(Curve("Refinement: training loss", label, steps, means))
    held_out = refinement.get("held_out", [])
    if held_out:
        at, values = [step for step, _ in held_out], [psnr for _, psnr in held_out]
        title = "Refinement: held-out PSNR to the float network, dB"
        curves.append(Curve(title, label, at, values, logarithmic=False))
    return curves


def _algorithm_curves(label: str, sites: Sequence[Mapping[str, Any]]) -> list[Curve]:
    objectives = [_kept([s["start"], *s["objectives"]]) for s in sites if s["objectives"]]
    curves = []
    if objectives:
        steps = range(max(map(len, objectives)))
        values = [median(line[min(step, len(line) - 1)] for line in objectives) for step in steps]
        curves.append(Curve("Algorithm 1: objective, start = 1", label, steps, values, _STAGES, logarithmic=False))
    balances = [{int(u): abs(a - b) / max(a + b, _TINY) for u, a, b in s["balances"]} for s in sites if s["balances"]]
    if balances:
        updates = sorted({update for line in balances for update in line})
        values = [median(_latest(line, update) for line in balances) for update in updates]
        title = "Algorithm 1: imbalance of the operands' errors"
        curves.append(Curve(title, label, updates, values, _UPDATES, logarithmic=False))
    return curves


def _kept(objectives: Sequence[float]) -> list[float]:
    """The smallest value so far, relative to the first: what is worse is rolled back."""
    return [value / max(objectives[0], _TINY) for value in accumulate(objectives, min)]


def _latest(line: Mapping[int, float], update: int) -> float:
    """The value at an update, or the last one before; the first where there is none before."""
    known = [at for at in line if at <= update]
    return line[max(known) if known else min(line)]


def _averaged(values: Sequence[float], width: int) -> tuple[list[int], list[float]]:
    """Means of consecutive values, and where each group ends."""
    groups = [values[at : at + width] for at in range(0, len(values), width)]
    ends = [min(at + width, len(values)) for at in range(0, len(values), width)]
    return ends, [sum(group) / len(group) for group in groups]
