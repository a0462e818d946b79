"""Algorithm 1 of HarmoQ, site by site in execution order: calibrate the residual, balance the scale, refine the ranges.

The input of each site comes from the quantized network as solved so far. Its target is what the float site makes of
that input, with the mean of the float network's output on the same images; or, by choice, more of the float network's
output. At every site the objective is the mean squared error of the output on a sample; a move that raises it is rolled
back, so it never ends above where it started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.harmonization.paper.capture import capture_inputs, common_batch, visit_inputs
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.paper.site_problem import LinearProblem, MatmulProblem, MatmulSample, SiteProblem
from harmoq_ao.harmonization.paper.site_solver import SiteSolver
from harmoq_ao.harmonization.paper.trace import AlgorithmTrace, SiteTrace
from harmoq_ao.harmonization.progress import open_progress
from harmoq_ao.harmonization.teacher import FloatNetwork, Teacher
from harmoq_ao.sites.base import PreparedSite, quiet
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear, PreparedMatmul


def run_algorithm(
    prepared: PreparedModel,
    batches: Sequence[Tensor],
    settings: AlgorithmSettings | None = None,
    *,
    teacher: Teacher | None = None,
    show_progress: bool | None = None,
) -> AlgorithmTrace:
    """Run Algorithm 1 on a calibrated model, in place. With all components off nothing is changed.

    Convolutions are left as calibrated; a site that runs several times is solved at its first call.

    Args:
        prepared: A calibrated model, fake-quantization on.
        batches: Low-resolution image batches `[B, C, H, W]` or images `[C, H, W]` in 0..1.
        settings: What to do; the default if None.
        teacher: The float network; by default it is made from `prepared` as it is.
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Raises:
        CalibrationError: No images, or the model is not calibrated.
        InputError: A batch is no image batch.
    """
    settings = settings or AlgorithmSettings()
    trace = AlgorithmTrace(settings)
    _check_calibrated(prepared)
    if not (settings.src or settings.hso or settings.abr):
        return trace
    like = next((p for p in prepared.parameters() if p.is_floating_point()), torch.empty(0))
    image = common_batch(batches, settings.images).to(like)
    reference = (teacher or Teacher(prepared)).exact
    with torch.no_grad(), quiet():  # trace graphs for this image size before anything is captured
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
    """One run over all sites, in as many passes as the memory for captured inputs requires."""

    def __init__(self, prepared: PreparedModel, reference: FloatNetwork, image: Tensor, trace: AlgorithmTrace) -> None:
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
        """Capture as much as fits and solve it; returns whether there was anything to solve."""
        wanted = capture_inputs(self.reference, self.image, self.remaining, self._keep, self.settings.memory)

        def solve(site: PreparedSite, args: tuple[Tensor, ...]) -> None:
            self.trace.sites.append(self._solve(site, args, wanted.pop(site.site.path)))

        visit_inputs(self.prepared, self.image, list(wanted), solve)
        solved = {trace.name for trace in self.trace.sites}
        before = len(self.remaining)
        self.remaining = {p: None for p in self.remaining if self.sites[p].site.name not in solved}
        return len(self.remaining) < before

    def _keep(self, site: PreparedSite, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The whole input of a linear layer (filters need the grid), or a sample of a product."""
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
        solver = SiteSolver(problem, self.settings)
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
