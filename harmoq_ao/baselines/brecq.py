"""BRECQ: block by block, learn the rounding of weights and the ranges of activations from the block's float output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from harmoq_ao.baselines.base import Baseline, Budget
from harmoq_ao.baselines.block_reconstruction import (
    StageCall,
    block_error,
    relative_error,
    restore,
    snapshot,
    stage_calls,
)
from harmoq_ao.baselines.learned_rounding import LearnedRounding
from harmoq_ao.common.progress import track
from harmoq_ao.harmonization.checkpoint import Checkpoint
from harmoq_ao.harmonization.identity import work_identity
from harmoq_ao.harmonization.learner import Learner
from harmoq_ao.harmonization.sampling import image_batches
from harmoq_ao.harmonization.settings import Rates
from harmoq_ao.harmonization.stages import Stage, find_stages
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.harmonization.weights import frozen, set_weight
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear

MAX_IMAGES = 64
"""Images whose inputs and outputs of one block are held at a time."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """How a block is reconstructed.

    Args:
        bounds_rate: Learning rate of activation ranges, as a share of the range.
        travel: Sum of the learning rates of the rounding's logits over all steps, how far they can get; at most 0.5
            in a step.
        regularization: Weight of the rounding term beside the error relative to its start.
        betas: Exponent of the rounding term, after the warm-up and at the end.
        warm_up: Share of the steps at the beginning without the rounding term.
        decided: Share of the steps at the end with all weights rounded, for the ranges to follow.
    """

    bounds_rate: float = 2e-2
    travel: float = 40.0
    regularization: float = 1.0
    betas: tuple[float, float] = (20.0, 2.0)
    warm_up: float = 0.15
    decided: float = 0.2


class BRECQ(Baseline):
    """Block reconstruction: learned rounding of weights, learned ranges of activations.

    Source: Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu: "BRECQ: Pushing the limit of post-training quantization by
    block reconstruction", ICLR 2021, with the rounding of AdaRound (ICML 2020).

    Different here: the error of a block's output is a plain mean square, not weighted by the squared gradient of the
    task's loss (there is no task without labels). Weights and activations are learned together and from the beginning,
    inputs come from the quantized blocks before; bounds of activations go on learning after the rounding is decided,
    and have two sides. The schedule is as long as the given steps, with rates to match, where the paper takes 20000. A
    block that does not gain stays as it was. Sites outside of all blocks keep the ranges of
    :class:`DOBI`; a network without repeated blocks is one block.
    """

    name = "brecq"
    title = "BRECQ"
    observer = "mse"
    learns = True

    def learn(self, prepared: PreparedModel, crops: Sequence[Tensor], budget: Budget) -> None:
        """Reconstruct every block in as many steps as the budget has: together the work of that many of the network."""
        count = min(MAX_IMAGES, budget.steps * budget.batch_size)
        batches = image_batches(prepared, crops, count, budget.batch_size, budget.crop_size, budget.seed)
        teacher = Teacher(prepared)
        stages = blocks(prepared)
        numbers = {name: getattr(budget, name) for name in ("steps", "batch_size", "crop_size", "seed")}
        settings = ReconstructionSettings()
        work = {"method": self.name, "budget": numbers, "reconstruction": asdict(settings)}
        store = Checkpoint(budget.checkpoint, work_identity(prepared, teacher, crops, (), work))
        with frozen(prepared):
            done, rounded = _resume(store, stages)
            for index, stage in enumerate(track(stages, "Reconstructing blocks", show=budget.show_progress), start=1):
                if index > done:
                    calls = stage_calls(prepared, teacher, stage, batches)
                    reconstruct(stage, calls, budget.steps, seed=budget.seed, rounded=rounded, settings=settings)
                    _save(store, stages[:index], rounded)


def blocks(prepared: PreparedModel) -> list[Stage]:
    """The repeated blocks of the model, or the whole model as one if there are none."""
    return find_stages(prepared) or [Stage("", prepared.model, tuple(prepared.sites()))]


def reconstruct(
    stage: Stage,
    calls: Sequence[StageCall],
    steps: int,
    *,
    seed: int = 0,
    rounded: set[int] | None = None,
    settings: ReconstructionSettings | None = None,
) -> tuple[float, float]:
    """Learn the rounding and the ranges of one block.

    Args:
        stage: The block, calibrated, fake-quantization on.
        calls: Inputs from the quantized prefix, with the float block's output as target.
        steps: Gradient steps, one call each.
        seed: Of the order of the calls.
        rounded: Identities of weights already rounded, because an earlier block shares them; extended in place.
        settings: How to reconstruct; the default if None.

    Returns:
        Mean squared error relative to the targets' mean square, before and after; the second is never larger.
    """
    settings = settings or ReconstructionSettings()
    rounded = set() if rounded is None else rounded
    before = block_error(stage, calls)
    kept = snapshot(stage)
    roundings = _Roundings(stage, steps, settings, rounded)
    rates = Rates(bounds=settings.bounds_rate, scales=0.0, weights=0.0, rest=0.0)
    learner = Learner(stage.sites, rates, math.ceil(steps / (1.0 - settings.decided)))
    order = torch.randint(len(calls), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    for step, index in enumerate(order):
        term = roundings.advance(step / steps)
        roundings.step(relative_error(stage, calls[index]) / max(before, 1e-12) + term, learner)
    learner.finish()
    roundings.finish()
    after = block_error(stage, calls)
    if after < before:
        rounded.update(roundings.weights)
        return before, after
    restore(stage, kept)
    return before, before


def _save(store: Checkpoint, done: Sequence[Stage], rounded: set[int]) -> None:
    """Keep the blocks that are done, and which of their weights are rounded."""
    tensors = {name: tensor for stage in done for name, tensor in snapshot(stage).items()}
    paths = [site.site.path for stage in done for site in stage.sites if id(site.own_weight) in rounded]
    store.save(tensors, {"blocks": len(done), "rounded": paths})


def _resume(store: Checkpoint, stages: Sequence[Stage]) -> tuple[int, set[int]]:
    """Put kept blocks into the model; their number, and the identities of their rounded weights."""
    found = store.load()
    if found is None:
        return 0, set()
    kept, data = found
    done = stages[: int(data["blocks"])]
    for stage in done:
        restore(stage, kept)
    sites = [site for stage in done for site in stage.sites]
    return len(done), {id(site.own_weight) for site in sites if site.site.path in set(data["rounded"])}


class RoundingQuantize(HarmoqFakeQuantize):
    """Replaces a weight quantizer while its rounding is learned.

    Args:
        quantizer: The weight quantizer, calibrated.
        weight: What it rounds, joint scale included.

    Attributes:
        decided: Whether to return the weight at its levels, without gradients.
    """

    def __init__(self, quantizer: HarmoqFakeQuantize, weight: Tensor) -> None:
        super().__init__(quantizer.spec)
        step, lower = quantizer.calculate_qparams()
        self.rounding = LearnedRounding(weight, lower, step, quantizer.spec.bits)
        self.decided = False
        self.learnable = False
        self.to(weight.device)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """The weight given at construction (`x` is ignored), each entry between its two levels, or at one of them."""
        return (self.rounding.hard() if self.decided else self.rounding.soft()).to(x.dtype)


class _Roundings:
    """The learned roundings of a block's weights, in place of their quantizers from construction to :meth:`finish`."""

    def __init__(self, stage: Stage, steps: int, settings: ReconstructionSettings, skipped: set[int]) -> None:
        self.settings = settings
        self.weights: set[int] = set()
        self._places: list[tuple[PreparedLinear | PreparedConv2d, HarmoqFakeQuantize, RoundingQuantize]] = []
        for site in stage.sites:
            if not isinstance(site, (PreparedLinear, PreparedConv2d)) or site.weight_quantizer is None:
                continue
            if id(site.weight) in skipped | self.weights:
                continue
            self.weights.add(id(site.weight))
            stand_in = RoundingQuantize(site.weight_quantizer, site.scaled_weight())
            self._places.append((site, site.weight_quantizer, stand_in))
            site.weight_quantizer = stand_in
        logits = [stand_in.rounding.logits for _, _, stand_in in self._places]
        self._optimizer = torch.optim.Adam(logits, lr=min(0.5, settings.travel / steps)) if logits else None

    def advance(self, progress: float) -> Tensor | float:
        """Set the progress, 0 to 1, and return the rounding term there; round for good once its time is over."""
        start, end = self.settings.warm_up, 1.0 - self.settings.decided
        for _, _, stand_in in self._places:
            stand_in.decided = progress >= end
        if not self._places or not start <= progress < end:
            return 0.0
        first, last = self.settings.betas
        beta = first + (last - first) * (progress - start) / (end - start)
        terms = [stand_in.rounding.regularizer(beta) for _, _, stand_in in self._places]
        return self.settings.regularization * torch.stack(terms).mean()

    def step(self, loss: Tensor, learner: Learner) -> None:
        """One update of ranges and roundings."""
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        if loss.requires_grad and learner.parameters:
            learner.step(loss)
        elif loss.requires_grad:  # dynamic activations have no range to learn
            loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()

    @torch.no_grad()
    def finish(self) -> None:
        """Round every entry, write the weights, and put their quantizers back."""
        for site, quantizer, stand_in in self._places:
            site.weight_quantizer = quantizer
            weight = stand_in.rounding.hard()
            if isinstance(site, PreparedLinear):
                scale = site.joint_scale
                set_weight(site, (weight if scale is None else weight / scale).to(site.weight.dtype))
            else:
                site.weight.copy_(weight)
