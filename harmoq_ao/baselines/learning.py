"""Learning some quantization ranges of a network and nothing else, with the library's refinement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from harmoq_ao.baselines.base import Budget, activation_quantizers, weight_quantizers
from harmoq_ao.harmonization.refine import refine
from harmoq_ao.harmonization.settings import Rates, RefineSettings
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.sites.model import PreparedModel


@contextmanager
def fixed_ranges(quantizers: Iterable[HarmoqFakeQuantize]) -> Iterator[None]:
    """Context manager inside which no learning moves the ranges of `quantizers`."""
    before = [(quantizer, quantizer.learnable) for quantizer in quantizers]
    for quantizer, _ in before:
        quantizer.learnable = False
    try:
        yield
    finally:
        for quantizer, learnable in before:
            quantizer.learnable = learnable


def distil_bounds(
    prepared: PreparedModel,
    crops: Sequence[Tensor],
    budget: Budget,
    *,
    method: str,
    rate: float,
    teacher: Teacher | None = None,
    activations: bool = True,
    weights: bool = True,
) -> None:
    """Refine the quantization ranges of a network and nothing else; see :func:`refine`.

    Nothing happens where there is nothing to learn: dynamic activations have no static range, and those of 8-bit
    weights are fixed by their largest magnitude.

    Args:
        prepared: Calibrated; changed in place.
        crops: Images `[C, S, S]`.
        budget: Steps, what a step sees, and where progress is kept.
        method: Name of the baseline: a checkpoint is of one.
        rate: Learning rate of Adam, as a share of the range.
        teacher: The float network; by default it is made from `prepared` as it is.
        activations: Learn ranges of activations.
        weights: Learn ranges of weights.
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
    with fixed_ranges(fixed):
        refine(
            prepared,
            crops,
            settings,
            teacher=teacher,
            method=method,
            checkpoint=budget.checkpoint,
            show_progress=budget.show_progress,
        )


def rows_to_learn(prepared: PreparedModel) -> list[HarmoqFakeQuantize]:
    """Weight quantizers whose range can be learned; codes of 8-bit weights are signed around a zero in the middle."""
    return [q for q in weight_quantizers(prepared) if q.learnable]
