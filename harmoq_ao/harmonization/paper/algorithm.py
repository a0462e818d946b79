"""Algorithm 1 of HarmoQ, site by site in execution order: calibrate the residual, balance the scale, refine the bounds.

The input of each site comes from the quantized network as solved so far. Its target is what the float site makes of
that input, with the mean of the float network's output on the same images; or, by choice, more of the float network's
output. At every site the objective is the mean squared error of the output on a sample; a move that raises it is rolled
back, so it never ends above where it started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.harmonization.paper.abr import ABRSettings, BoundaryRefiner, Contraction, error_balance, output_error
from harmoq_ao.harmonization.paper.capture import capture_inputs, common_batch, visit_inputs
from harmoq_ao.harmonization.paper.projections import SPATIAL_FILTERS, Projection, Subspace
from harmoq_ao.harmonization.paper.site_problem import LinearProblem, MatmulProblem, MatmulSample, SiteProblem
from harmoq_ao.harmonization.paper.src import SRCSettings
from harmoq_ao.harmonization.progress import open_progress
from harmoq_ao.harmonization.reference import float_reference
from harmoq_ao.sites.base import PreparedSite, quiet
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear, PreparedMatmul

Rounding = Literal["nearest", "gptq", "gptq-edges"]
_FIRST_EXPONENT = 0.5
_FIRST_EXPONENT_STEP = 0.25
_LAST_EXPONENT_STEP = 0.1


@dataclass(frozen=True)
class AlgorithmSettings:
    """What Algorithm 1 does, and how much of it.

    Args:
        src: Calibrate weights and biases for the error of their input (structural residual calibration).
        hso: Balance the operands by a joint scale (harmonized scale optimization).
        abr: Refine the bounds (adaptive boundary refinement).
        rounding: How weights are rounded in the end: to the ``nearest`` level, by ``gptq``, or by ``gptq-edges``, which
            weighs tokens by the edges of the input. Not of the paper.
        projection: H of SRC: ``laplacian``, ``sobel``, ``dct``, ``learned``, ``random`` or ``identity``.
        edge_weight: Weight of a spatial filter beside the plain residual; infinity leaves the filter alone.
        ridge: Relative ridge of SRC.
        subspace: Size of a channel projection, or ``adaptive``.
        printed: SRC as the paper prints it, for comparison: regression on the float input, filter alone, bias
            untouched, and the result kept whatever it does to the objective.
        on_float: Regress SRC on the input before its quantizer instead of after it.
        inherited: Share, 0 to 1, of the deviation that a site's input brings along which its output is to make up for.
            The mean of a linear layer always counts in full. With a joint scale and shift less is better on DAT-light
            (2 bits, SRC alone: 0.4 dB between 0 and 1); a regression on a noisy input shrinks its output, which may be
            why.
        updates: Most updates of bounds per site.
        rate: First step of a bound in units of its range.
        rows: Rows per site that the objective is measured on.
        images: Most images; more than a few are not needed, and memory grows with them.
        rebalance_every: Updates between two looks at progress and balance.
        balance_tolerance: Difference of the operands' shares of the error that is left alone, relative to the error
            before.
        src_factor: SRC is applied again where the difference exceeds this many tolerances.
        memory: Bytes of captured inputs held at a time; sites are solved in so many passes.
        seed: Of samples and random projections.

    Raises:
        ConfigError: A value is outside its set.
    """

    src: bool = True
    hso: bool = True
    abr: bool = True
    rounding: Rounding = "nearest"
    projection: Projection = "laplacian"
    edge_weight: float = 1.0
    ridge: float = 1e-2
    subspace: Subspace = "adaptive"
    printed: bool = False
    on_float: bool = False
    inherited: float = 0.0
    updates: int = 20
    rate: float = 5e-2
    rows: int = 2048
    images: int = 8
    rebalance_every: int = 5
    balance_tolerance: float = 0.01
    src_factor: float = 1.5
    memory: int = 512 << 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "images", "rebalance_every", "memory"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive", found=repr(getattr(self, name)), expected="1 or more")
        if self.balance_tolerance < 0 or self.src_factor < 0:
            raise ConfigError("A tolerance is negative", found=(self.balance_tolerance, self.src_factor))
        if self.rounding not in get_args(Rounding):
            raise ConfigError("Unknown rounding", found=self.rounding, expected=get_args(Rounding))
        if not 0 <= self.inherited <= 1:
            raise ConfigError("The inherited share is out of range", found=self.inherited, expected="0 to 1")
        self.src_settings()
        self.abr_settings()

    def src_settings(self) -> SRCSettings:
        """Settings of the first component."""
        if self.printed:
            return replace(SRCSettings.printed(self.projection, self.ridge), subspace=self.subspace, seed=self.seed)
        return SRCSettings(
            self.projection, self.edge_weight, self.ridge, self.subspace, on_float=self.on_float, seed=self.seed
        )

    def abr_settings(self) -> ABRSettings:
        """Settings of the third component."""
        return ABRSettings(self.updates, self.rate, self.rate / 100, review_every=self.rebalance_every)


# --- what happened ----------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """Something that happened at a site.

    Attributes:
        update: Updates of the bounds done before.
        kind: ``bias`` (the bias takes up the mean error), ``src``, ``bounds`` (searched anew), ``hso``, ``rebalance``,
            ``rounding``, ``rollback`` (of the last updates) or ``early stop``.
        kept: Whether the move was kept or rolled back.
        objective: Relative objective that the move led to.
    """

    update: int
    kind: str
    kept: bool
    objective: float


class Balance(NamedTuple):
    """Shares of the relative output error that the rounding of each operand causes alone.

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
    """How one site was solved. Objectives are mean squared output errors relative to the variance of the float output.

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
    """How :func:`run_algorithm` went.

    Args:
        settings: What was asked for.
        sites: One entry for every solved site, in execution order.
        skipped: Names of the sites that were not solved, with the reason.
    """

    settings: AlgorithmSettings
    sites: list[SiteTrace] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form (an infinite weight of edges is written as text)."""
        settings = asdict(self.settings)
        settings["edge_weight"] = str(self.settings.edge_weight)
        sites = [{f.name: getattr(site, f.name) for f in fields(site)} for site in self.sites]
        for site in sites:
            site["balances"] = [list(b) for b in site["balances"]]
            site["events"] = [list(e) for e in site["events"]]
            site["objectives"] = list(site["objectives"])
        return {"settings": settings, "sites": sites, "skipped": dict(self.skipped)}

    @classmethod
    def from_dict(cls, data: Any) -> AlgorithmTrace:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: Not what :meth:`to_dict` returns.
        """
        try:
            given = {**data["settings"], "edge_weight": float(data["settings"]["edge_weight"])}
            sites = [SiteTrace(**site) for site in data["sites"]]
            for site in sites:
                site.balances = [Balance(*b) for b in site.balances]
                site.events = [Event(*e) for e in site.events]
            return cls(AlgorithmSettings(**given), sites, dict(data["skipped"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(
                "This is no trace of the algorithm",
                found=f"{type(error).__name__}: {error}",
                expected="what AlgorithmTrace.to_dict returns",
            ) from error


# --- the algorithm ----------------------------------------------------------------------------------------------------


def run_algorithm(
    prepared: PreparedModel,
    batches: Sequence[Tensor],
    settings: AlgorithmSettings | None = None,
    *,
    show_progress: bool | None = None,
) -> AlgorithmTrace:
    """Run Algorithm 1 on a calibrated model, in place. With all components off nothing is changed.

    Convolutions are left as calibrated; a site that runs several times is solved at its first call.

    Args:
        prepared: A calibrated model, fake-quantization on.
        batches: Low-resolution image batches `[B, C, H, W]` or images `[C, H, W]` in 0..1.
        settings: What to do.
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Raises:
        CalibrationError: No images, or the model is not calibrated.
        InputError: A batch is no image batch.
    """
    settings = settings or AlgorithmSettings()
    trace = AlgorithmTrace(settings)
    _check_calibrated(prepared)
    if not (settings.src or settings.hso or settings.abr or settings.rounding != "nearest"):
        return trace
    like = next((p for p in prepared.parameters() if p.is_floating_point()), torch.empty(0))
    image = common_batch(batches, settings.images).to(like)
    reference = float_reference(prepared)
    with torch.no_grad(), quiet():  # graphs for this image size, before anything is captured
        prepared(image)
        reference(image)
    run = _Run(prepared, reference, image, trace)
    with open_progress("Harmonizing", len(run.remaining), 0, show_progress) as advance:
        while run.remaining and run.next_pass():
            advance(len(trace.sites), f"{trace.sites[-1].name}")
    trace.skipped.update(dict.fromkeys(run.remaining, "not reached by these images"))
    return trace


def _check_calibrated(prepared: PreparedModel) -> None:
    for site in prepared.sites():
        for quantizer in site.quantizers():
            if not (quantizer.spec.dynamic or quantizer.has_bounds):
                raise CalibrationError(
                    f"{site.site.name} is not calibrated",
                    found="a quantizer without bounds",
                    remedy="call calibrate(prepared, data) first",
                )


class _Run:
    """One run over all sites, in as many passes as the memory for captured inputs asks for."""

    def __init__(self, prepared: PreparedModel, reference: PreparedModel, image: Tensor, trace: AlgorithmTrace) -> None:
        self.prepared, self.reference, self.image, self.trace = prepared, reference, image, trace
        self.settings = trace.settings
        self.sites = {site.site.path: site for site in prepared.sites()}
        self.references = {site.site.path: site for site in reference.sites()}
        self.order = {path: index for index, path in enumerate(self.sites)}
        self.shared = _shared_parameters(prepared)
        self.plans: dict[str, MatmulSample] = {}
        self.remaining: dict[str, None] = {}  # an ordered set
        for path, site in self.sites.items():
            reason = _left_alone(site)
            if reason is None:
                self.remaining[path] = None
            else:
                trace.skipped[site.site.name] = reason

    def next_pass(self) -> bool:
        """Capture what fits, solve it; whether anything was there to solve."""
        wanted = capture_inputs(self.reference, self.image, self.remaining, self._keep, self.settings.memory)

        def solve(site: PreparedSite, args: tuple[Tensor, ...]) -> None:
            self.trace.sites.append(self._solve(site, args, wanted.pop(site.site.path)))

        visit_inputs(self.prepared, self.image, list(wanted), solve)
        solved = {trace.name for trace in self.trace.sites}
        before = len(self.remaining)
        self.remaining = {p: None for p in self.remaining if self.sites[p].site.name not in solved}
        return len(self.remaining) < before

    def _keep(self, site: PreparedSite, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of a linear layer the whole input (filters need the grid), of a product a sample."""
        if not isinstance(site, PreparedMatmul):
            return (args[0].detach(),)
        path = site.site.path
        left, right = site.form.canonical(*args)
        self.plans[path] = MatmulSample.plan(left, right, self.settings.rows, self._seed(path))
        return self.plans[path].take(left, right)

    def _solve(self, site: PreparedSite, args: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> SiteTrace:
        path = site.site.path
        problem: SiteProblem
        if isinstance(site, PreparedMatmul):
            given = self.plans.pop(path).take(*site.form.canonical(*args))
            problem = MatmulProblem(site, given, (wanted[0], wanted[1]), inherited=self.settings.inherited)
        else:
            reference = self.references[path]
            assert isinstance(site, PreparedLinear)
            assert isinstance(reference, PreparedLinear)
            problem = LinearProblem(
                site,
                args[0].detach(),
                wanted[0],
                reference,
                (self.image.shape[0], self.image.shape[2], self.image.shape[3]),
                rows=self.settings.rows,
                seed=self._seed(path),
                inherited=self.settings.inherited,
                own_parameters=not any(id(p) in self.shared for p in (site.weight, site.bias)),
            )
        solver = _SiteSolver(problem, self.settings)
        problem.commit(solver.solve())
        return solver.trace

    def _seed(self, path: str) -> int:
        return self.settings.seed + 1000 * self.order[path]


def _left_alone(site: PreparedSite) -> str | None:
    if not any(q.active for q in site.quantizers()):
        return "stays in float"
    if isinstance(site, PreparedMatmul) and site.relative:
        return "an attention map relative to its rows keeps the bounds 0 and 1"
    return "convolutions are left as calibrated" if isinstance(site, PreparedConv2d) else None


def _shared_parameters(prepared: PreparedModel) -> set[int]:
    """Identities of weights and biases that more than one site uses."""
    linears = [site for site in prepared.sites() if isinstance(site, PreparedLinear)]
    uses = Counter(id(p) for site in linears for p in (site.weight, site.bias) if p is not None)
    return {key for key, count in uses.items() if count > 1}


class _SiteSolver:
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
        if self.settings.src and isinstance(self.problem, LinearProblem) and self.problem.can_calibrate:
            self._calibrate(self.problem)
        if self.settings.hso:
            self._consider(self._rescaled(None), "bounds", 0)
            if self.problem.can_scale:
                self._rescale(_FIRST_EXPONENT, "hso", 0)
        if self.settings.abr:
            self._refine()
        if self.settings.rounding != "nearest" and isinstance(self.problem, LinearProblem):
            self._round(self.problem)
        self.trace.end = self.objective / self._signal
        return self.state

    def _calibrate(self, problem: LinearProblem) -> None:
        """Step 1. The bias is free from here on: it takes up whatever mean error there is."""
        settings = self.settings.src_settings()
        filters = settings.projection in SPATIAL_FILTERS
        self.trace.projection = "identity" if filters and problem.grid is None else settings.projection
        if settings.centred and problem.corrects_bias:
            self._consider(replace(self.state, free_mean=True), "bias", 0)
        self._consider(problem.calibrated(self.state, settings), "src", 0, force=self.settings.printed)

    def _round(self, problem: LinearProblem) -> None:
        """After all steps. The quantizer reproduces what lies on its levels."""
        if problem.can_calibrate:
            edges = self.settings.rounding == "gptq-edges"
            self._consider(problem.rounded(self.state, edges=edges), "rounding", max(0, len(self.trace.objectives) - 1))

    def _rescale(self, exponent: float, kind: str, update: int) -> bool:
        """Step 2."""
        kept = self._consider(self._rescaled(exponent), kind, update)
        if kept:
            self.trace.exponent = self._exponent = exponent
        return kept

    def _rescaled(self, exponent: float | None) -> Contraction:
        """Another scale and other bounds; calibrated for them where step 1 is on."""
        candidate = self.problem.rescaled(self.state, exponent)
        if self._calibrates:
            assert isinstance(self.problem, LinearProblem)
            candidate = self.problem.calibrated(candidate, self.settings.src_settings())
        return candidate

    @property
    def _calibrates(self) -> bool:
        problem = self.problem
        return self.settings.src and isinstance(problem, LinearProblem) and problem.can_calibrate

    def _refine(self) -> None:
        """Step 3, with a look at the balance every few updates."""
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
        """Recompute the scale, and calibrate again, where one operand causes much more of the error; if changed."""
        left, right = error_balance(self.state)
        self.trace.balances.append(Balance(update, left / self._signal, right / self._signal))
        difference = left - right
        changed = False
        if self.settings.hso and self.problem.can_scale and abs(difference) > tolerance:
            changed = self._rebalance(difference, update)
        if self._calibrates and abs(difference) > self.settings.src_factor * tolerance:
            assert isinstance(self.problem, LinearProblem)
            candidate = self.problem.calibrated(self.state, self.settings.src_settings())
            changed = self._consider(candidate, "src", update) or changed
        return changed

    def _rebalance(self, difference: float, update: int) -> bool:
        """Move the exponent towards the operand that causes more error; half as far after a failure."""
        if self._exponent_step < _LAST_EXPONENT_STEP:
            return False
        step = self._exponent_step if difference > 0 else -self._exponent_step
        exponent = min(1.0, max(0.0, self._exponent + step))
        kept = exponent != self._exponent and self._rescale(exponent, "rebalance", update)
        if not kept:
            self._exponent_step /= 2
        return kept

    def _consider(self, candidate: Contraction, kind: str, update: int, *, force: bool = False) -> bool:
        """Keep a candidate unless it raises the objective."""
        objective = output_error(candidate)
        kept = force or objective <= self.objective
        if kept:
            self.state, self.objective = candidate, objective
        self._note(update, kind, kept, objective)
        return kept

    def _note(self, update: int, kind: str, kept: bool, objective: float) -> None:
        self.trace.events.append(Event(update, kind, kept, objective / self._signal))
