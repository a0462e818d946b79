"""Records of Algorithm 1, site by site."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from harmoq_ao.harmonization.paper.settings import AlgorithmSettings


class Event(NamedTuple):
    """A move at a site.

    Attributes:
        update: Updates of the bounds done before.
        kind: ``bias`` (the bias absorbs the mean error), ``src``, ``bounds`` (searched anew), ``hso``, ``rebalance``,
            ``rollback`` (of the last updates) or ``early stop``.
        kept: Whether the move was kept or rolled back.
        objective: Relative objective that the move led to.
    """

    update: int
    kind: str
    kept: bool
    objective: float


class Balance(NamedTuple):
    """Relative output errors that the rounding of each operand causes alone.

    Attributes:
        update: Updates of the bounds done before.
        left: Of the activation (left operand).
        right: Of the weight (right operand).
    """

    update: int
    left: float
    right: float


@dataclass
class SiteTrace:
    """Record of one site. Objectives are mean squared output errors relative to the variance of the float output.

    Args:
        name: Of the site.
        kind: ``linear`` or ``matmul``.
        projection: H that SRC used there; ``identity`` where a filter found no grid of tokens; None without SRC.
        start: Objective before.
        end: Objective after.
        exponent: Exponent of the joint scale, or None if it was left as it was.
        objectives: Objective at the start of the refinement and after every update.
        balances: The balance every few updates.
        events: Moves, kept and rolled back.
    """

    name: str
    kind: str
    projection: str | None = None
    start: float = 0.0
    end: float = 0.0
    exponent: float | None = None
    objectives: list[float] = field(default_factory=list)
    balances: list[Balance] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


@dataclass
class AlgorithmTrace:
    """Record of a call of :func:`run_algorithm`.

    Args:
        settings: The settings it ran with.
        sites: One entry for every solved site, in execution order.
        skipped: Names of the sites that were not solved, with the reason.
    """

    settings: AlgorithmSettings
    sites: list[SiteTrace] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form (an infinite `edge_weight` is written as text)."""
        data = asdict(self)
        data["settings"]["edge_weight"] = str(self.settings.edge_weight)
        return data
