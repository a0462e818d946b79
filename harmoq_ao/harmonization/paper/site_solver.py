"""The three steps of Algorithm 1 at one site."""

from __future__ import annotations

from dataclasses import replace

from harmoq_ao.harmonization.paper.abr import BoundaryRefiner
from harmoq_ao.harmonization.paper.contraction import Contraction, error_balance, output_error
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.paper.site_problem import SiteProblem
from harmoq_ao.harmonization.paper.trace import Balance, Event, SiteTrace

_FIRST_EXPONENT = 0.5
_FIRST_EXPONENT_STEP = 0.25
_LAST_EXPONENT_STEP = 0.1


class SiteSolver:
    """The three steps at one site. The state is the best found so far; every candidate has to beat it."""

    def __init__(self, problem: SiteProblem, settings: AlgorithmSettings) -> None:
        self.problem, self.settings = problem, settings
        self.refinement = settings.abr_settings()
        self.state = problem.initial
        self.objective = output_error(self.state)
        self._signal = max(problem.signal, 1e-30)
        self._exponent = _FIRST_EXPONENT
        self._exponent_step = _FIRST_EXPONENT_STEP
        site = problem.site.site
        self.trace = SiteTrace(site.name, site.kind, start=self.objective / self._signal)

    def solve(self) -> Contraction:
        """The best state."""
        if self._calibrates:
            self._calibrate()
        if self.settings.hso:
            self._consider(self._rescaled(None), "bounds", 0)
            if self.problem.can_scale:
                self._rescale(_FIRST_EXPONENT, "hso", 0)
        if self.settings.abr:
            self._refine()
        self.trace.end = self.objective / self._signal
        return self.state

    @property
    def _calibrates(self) -> bool:
        return self.settings.src and self.problem.can_calibrate

    def _calibrate(self) -> None:
        """Step 1: SRC. From here on the bias is free: it absorbs the mean error."""
        settings = self.settings.src_settings()
        self.trace.projection = self.problem.usable_projection(settings.projection)
        if settings.centred and self.problem.corrects_bias:
            self._consider(replace(self.state, free_mean=True), "bias", 0)
        self._consider(self.problem.calibrated(self.state, settings), "src", 0, force=self.settings.printed)

    def _rescale(self, exponent: float, kind: str, update: int) -> bool:
        """Step 2: HSO."""
        kept = self._consider(self._rescaled(exponent), kind, update)
        if kept:
            self.trace.exponent = self._exponent = exponent
        return kept

    def _rescaled(self, exponent: float | None) -> Contraction:
        """A state with another scale and new ranges; calibrated for them if step 1 is on."""
        candidate = self.problem.rescaled(self.state, exponent)
        if self._calibrates:
            candidate = self.problem.calibrated(candidate, self.settings.src_settings())
        return candidate

    def _refine(self) -> None:
        """Step 3: ABR, with a look at the balance every few updates."""
        refiner = BoundaryRefiner(self.state, self.refinement)
        tolerance = self.settings.balance_tolerance * self.objective
        objectives = [self.objective]
        for update in range(1, self.refinement.updates + 1 if refiner.can_learn else 1):
            objectives.append(refiner.update())
            self.state, self.objective = refiner.best, refiner.objective
            if update % self.refinement.review_every:
                continue
            if not refiner.review():
                self._note(update, "rollback", False, objectives[-1])
            if self._coordinate(update, tolerance):
                refiner.restart(self.state)
            elif refiner.failures >= self.refinement.patience:
                self._note(update, "early stop", True, self.objective)
                break
        self.trace.objectives = [o / self._signal for o in objectives]

    def _coordinate(self, update: int, tolerance: float) -> bool:
        """Recompute the scale and calibrate again where one operand dominates the error; True if it changed."""
        left, right = error_balance(self.state)
        self.trace.balances.append(Balance(update, left / self._signal, right / self._signal))
        difference = left - right
        changed = False
        if self.settings.hso and self.problem.can_scale and abs(difference) > tolerance:
            changed = self._rebalance(difference, update)
        if self._calibrates and abs(difference) > self.settings.src_factor * tolerance:
            candidate = self.problem.calibrated(self.state, self.settings.src_settings())
            changed = self._consider(candidate, "src", update) or changed
        return changed

    def _rebalance(self, difference: float, update: int) -> bool:
        """Move the exponent towards the operand that causes more error, half as far after each failure."""
        if self._exponent_step < _LAST_EXPONENT_STEP:
            return False
        step = self._exponent_step if difference > 0 else -self._exponent_step
        exponent = min(1.0, max(0.0, self._exponent + step))
        kept = exponent != self._exponent and self._rescale(exponent, "rebalance", update)
        if not kept:
            self._exponent_step /= 2
        return kept

    def _consider(self, candidate: Contraction, kind: str, update: int, *, force: bool = False) -> bool:
        """Keep a candidate unless it raises the objective; returns whether it was kept."""
        objective = output_error(candidate)
        kept = force or objective <= self.objective
        if kept:
            self.state, self.objective = candidate, objective
        self._note(update, kind, kept, objective)
        return kept

    def _note(self, update: int, kind: str, kept: bool, objective: float) -> None:
        self.trace.events.append(Event(update, kind, kept, objective / self._signal))
