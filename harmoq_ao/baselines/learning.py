"""Learning some bounds of a network and not others, with the library's refinement against the float network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from harmoq_ao.baselines.base import Budget, activation_quantizers, weight_quantizers
from harmoq_ao.harmonization.learner import Rates
from harmoq_ao.harmonization.refine import RefineSettings, refine
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.quantizer import Scheme
from harmoq_ao.sites.model import PreparedModel

Bounds = tuple[Tensor, Tensor]


@contextmanager
def bounds_replaced(
    quantizers: Iterable[HarmoqFakeQuantize], make: Callable[[HarmoqFakeQuantize], Callable[[], Bounds]]
) -> Iterator[None]:
    """Within, ``quantizer.bounds()`` is what ``make(quantizer)`` returns: it decides where gradients go."""
    changed = list(quantizers)
    for quantizer in changed:
        quantizer.__dict__["bounds"] = make(quantizer)
    try:
        yield
    finally:
        for quantizer in changed:
            del quantizer.__dict__["bounds"]


def frozen(quantizer: HarmoqFakeQuantize) -> Callable[[], Bounds]:
    """The bounds as they are, out of reach of any gradient."""
    lo, hi = (bound.detach().clone() for bound in quantizer.bounds())
    return lambda: (lo, hi)


def distil_bounds(
    prepared: PreparedModel,
    crops: Sequence[Tensor],
    budget: Budget,
    *,
    rate: float,
    activations: bool = True,
    weights: bool = True,
) -> None:
    """Draw the quantized network to the float one by its bounds alone; see :func:`refine`.

    Nothing happens where there is nothing to learn: dynamic activations have no bounds, and those of 8-bit weights are
    fixed by their largest magnitude.

    Args:
        prepared: Calibrated; changed in place.
        crops: Images `[C, S, S]`.
        budget: Steps, and what a step sees.
        rate: Learning rate of Adam, as a share of the distance of the bounds.
        activations: Learn bounds of activations.
        weights: Learn bounds of weights.
    """
    inputs, rows = activation_quantizers(prepared), weight_quantizers(prepared)
    learned = (inputs if activations else []) + (rows_to_learn(prepared) if weights else [])
    if budget.steps < 1 or not learned:
        return
    settings = RefineSettings(
        steps=budget.steps,
        batch_size=budget.batch_size,
        crop_size=budget.crop_size,
        rates=Rates(bounds=rate, scales=0.0, weights=0.0, rest=0.0),
        by_bits=False,
        seed=budget.seed,
    )
    fixed = ([] if activations else inputs) + ([] if weights else rows)
    with bounds_replaced(fixed, frozen):
        refine(prepared, crops, settings, show_progress=budget.show_progress)


def rows_to_learn(prepared: PreparedModel) -> list[HarmoqFakeQuantize]:
    """Weight quantizers whose bounds can be learned: those of 8 bits have signed codes around a zero in the middle."""
    return [q for q in weight_quantizers(prepared) if q.spec.scheme is not Scheme.INTEGER_ZERO_POINT]
