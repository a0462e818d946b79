"""The history that is saved with a model: method, preset, convergence and balance of harmonization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from harmoq_ao.common.errors import SavedModelError

MAX_POINTS = 60
"""Points of a saved curve; a longer one is thinned."""
_DIGITS = 4
_MAX_STORED = 4096  # points or sites that a saved model may claim to have
_MAX_TEXT = 1000
_MAX_NUMBER = 1e30

Curve = tuple[tuple[int, float], ...]
"""Points (step, value)."""


class SiteChange(NamedTuple):
    """What Algorithm 1 did to one site. All values are relative to the variance of the float output.

    Attributes:
        name: Of the site.
        start: Mean squared output error before.
        end: The same after.
        left: Error that rounding of the activation (left operand) alone causes, as last measured; None if never.
        right: The same for the weight (right operand).
    """

    name: str
    start: float
    end: float
    left: float | None
    right: float | None


@dataclass(frozen=True)
class History:
    """How a model was made.

    Args:
        method: As on the command line, or None if it is not known.
        preset: How much optimisation, or None.
        sites: Sites in the order Algorithm 1 solved them; empty where it did not run.
        losses: Training loss of the refinement, thinned; empty where it did not run.
        held_out: Fidelity to the float network on the held-out crops, PSNR in dB.
        best_step: Refinement step of the kept state, or None.
        choice: The mixed-precision bit allocation in words, or None.
        sensitivities: Loss that each site alone causes at its bits, in dB, where it was measured.
    """

    method: str | None = None
    preset: str | None = None
    sites: tuple[SiteChange, ...] = ()
    losses: Curve = ()
    held_out: Curve = ()
    best_step: int | None = None
    choice: str | None = None
    sensitivities: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "method": self.method,
            "preset": self.preset,
            "sites": [list(site) for site in self.sites],
            "losses": [list(point) for point in self.losses],
            "held_out": [list(point) for point in self.held_out],
            "best_step": self.best_step,
            "choice": self.choice,
            "sensitivities": self.sensitivities,
        }

    @classmethod
    def from_dict(cls, data: Any) -> History:
        """Inverse of :meth:`to_dict`; the data is not trusted.

        Raises:
            SavedModelError: The data is not a history.
        """
        try:
            history = cls(
                _text(data["method"]),
                _text(data["preset"]),
                tuple(_site(entry) for entry in _entries(data["sites"])),
                _curve(data["losses"]),
                _curve(data["held_out"]),
                None if data["best_step"] is None else _step(data["best_step"]),
                _text(data["choice"]),
                _by_site(data["sensitivities"]),
            )
            known = set(data) == set(history.to_dict())
        except (TypeError, KeyError, ValueError) as error:
            raise _invalid(f"{type(error).__name__}: {error}") from error
        if not known:
            raise _invalid("entries of another version")
        return history


def _invalid(found: str) -> SavedModelError:
    return SavedModelError(
        "The history of a saved model is not valid",
        found=found[:200],
        expected="what History.to_dict returns",
        remedy="copy the folder again, or quantize the float model anew",
    )


def short(value: float) -> float:
    """A number rounded to the four digits that are saved."""
    return float(f"{value:.{_DIGITS}g}")


def thinned(points: Sequence[tuple[int, float]]) -> Curve:
    """At most :data:`MAX_POINTS` points: means of the finite values over equal stretches, each at its last step."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    count = min(MAX_POINTS, len(finite))
    cuts = [len(finite) * i // count for i in range(count + 1)] if count else []
    parts = [finite[a:b] for a, b in pairwise(cuts)]
    return tuple((part[-1][0], short(math.fsum(v for _, v in part) / len(part))) for part in parts)


# --- validation of untrusted data -------------------------------------------------------------------------------------


def _entries(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MAX_STORED:
        raise ValueError("not a list, or too long")
    return value


def _text(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) > _MAX_TEXT):
        raise ValueError("not a text, or too long")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not -_MAX_NUMBER <= value <= _MAX_NUMBER:
        raise ValueError("not a finite number")
    return float(value)


def _step(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise ValueError("not a number of steps")
    return value


def _curve(value: Any) -> Curve:
    return tuple((_step(step), _number(number)) for step, number in _entries(value))


def _by_site(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > _MAX_STORED:
        raise ValueError("not a mapping, or too long")
    return {str(_text(name)): _number(number) for name, number in value.items()}


def _site(entry: Any) -> SiteChange:
    name, start, end, left, right = _entries(entry)
    if not isinstance(name, str) or len(name) > _MAX_TEXT:
        raise ValueError("a site without a name")
    shares = (None if share is None else _number(share) for share in (left, right))
    return SiteChange(name, _number(start), _number(end), *shares)
