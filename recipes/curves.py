"""Traces of harmonization as curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

OBJECTIVE = "Algorithm 1: objective, start = 1"
IMBALANCE = "Algorithm 1: imbalance of the operands' errors"
LOSS = "Refinement: training loss"
HELD_OUT = "Refinement: held-out PSNR to the float network, dB"
STEPS = {
    OBJECTIVE: "0 calibrated, 1 SRC and HSO, then updates; median over the sites",
    IMBALANCE: "updates of the quantization ranges; median over the sites",
}
"""What the steps of a curve are, where they are not steps of the optimizer."""
_TINY = 1e-30


def convergence_curves(label: str, trace: Mapping[str, Any]) -> pd.DataFrame:
    """Curves of one model, with the columns `curve`, `bits`, `step` and `value`.

    Of Algorithm 1 the medians over the sites: the objective that would be kept if it ended there, relative to that of
    the calibrated site, and by update of the ranges the imbalance of the operands' shares of the error,
    ``|left - right| / (left + right)``. A site that stopped early keeps its last value. Of the refinement the training
    loss, averaged over a fortieth of the steps, and the fidelity to the float network on the held-out crops.

    Args:
        label: Name of the model.
        trace: See :meth:`HarmonizeTrace.to_dict`.
    """
    sites = (trace.get("algorithm") or {}).get("sites", ())
    refinement = trace.get("refine") or {}
    objectives = pd.DataFrame([[s["start"], *s["objectives"]] for s in sites if s["objectives"]], dtype=float)
    kept = objectives.cummin(axis=1).ffill(axis=1)  # what is worse is rolled back
    shares = [{int(u): abs(a - b) / max(a + b, _TINY) for u, a, b in s["balances"]} for s in sites if s["balances"]]
    imbalances = pd.DataFrame(shares, dtype=float).sort_index(axis=1).ffill(axis=1).bfill(axis=1)
    losses = pd.Series(refinement.get("losses", ()), dtype=float)
    groups = losses.groupby(np.arange(len(losses)) // max(1, len(losses) // 40))
    curves = {
        OBJECTIVE: kept.div(kept.get(0, pd.Series(dtype=float)).clip(lower=_TINY), axis=0).median(),
        IMBALANCE: imbalances.median(),
        LOSS: groups.mean().set_axis(groups.size().cumsum()),
        HELD_OUT: pd.Series(dict(refinement.get("held_out", ())), dtype=float),
    }
    parts = [pd.DataFrame({"curve": c, "step": v.index, "value": v.to_numpy()}) for c, v in curves.items() if len(v)]
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["curve", "step", "value"])
    found.insert(1, "bits", label)
    return found
