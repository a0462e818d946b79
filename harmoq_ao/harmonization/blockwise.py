"""Refinement block by block: each is drawn to its float twin, on inputs from the quantized blocks before it.

A step costs a fraction of one through the whole network, and later blocks make up for errors of earlier ones. The image
is not seen: refinement of the whole network (`refine.py`) goes on from here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.common import distributed
from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.harmonization.learner import Learner, Rates, trainable_rest
from harmoq_ao.harmonization.progress import open_progress
from harmoq_ao.harmonization.reference import float_reference
from harmoq_ao.harmonization.stages import Stage, StageCall, capture_stage, find_stages, first_tensor
from harmoq_ao.sites.model import PreparedModel

_WARM_UP = 2


class BlockErrors(NamedTuple):
    """What became of one block.

    Attributes:
        name: Of the block.
        before: Mean squared error of its output, relative to the float output's mean square.
        after: The same after learning; never larger.
    """

    name: str
    before: float
    after: float


def refine_blocks(
    prepared: PreparedModel,
    batches: Sequence[Tensor],
    rates: Rates,
    steps: int,
    *,
    seed: int = 0,
    done: Sequence[BlockErrors] = (),
    after_block: Callable[[list[BlockErrors]], None] = lambda errors: None,
    show_progress: bool | None = None,
) -> list[BlockErrors]:
    """:func:`refine_block` for every block in execution order; a network without repeated blocks is left alone.

    Of several ranks (`harmoq_ao.common.distributed`) each does all of it and takes over what the first one has got.

    Args:
        prepared: Calibrated, fake-quantization on, its parameters frozen; changed in place.
        batches: Image batches `[B, C, S, S]`.
        rates: Learning rates, as they are.
        steps: Gradient steps of every block.
        seed: Of the order of the batches.
        done: Blocks that are done already, when resuming.
        after_block: Called after every block with all that are done.
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Returns:
        What became of each block, those of `done` first.
    """
    stages, errors = find_stages(prepared), list(done)
    with open_progress("Refining blocks", len(stages), len(errors), show_progress) as report:
        for stage in stages[len(errors) :]:
            errors.append(refine_block(prepared, stage, batches, rates, steps, seed=seed))
            distributed.broadcast_state(prepared)
            after_block(errors)
            report(len(errors), f"error {errors[-1].before:.4f} to {errors[-1].after:.4f}")
    return errors


def refine_block(
    prepared: PreparedModel, stage: Stage, batches: Sequence[Tensor], rates: Rates, steps: int, *, seed: int = 0
) -> BlockErrors:
    """Learn bounds, joint scales, weights and other parameters of one block; it stays as it was if that does not help.

    The loss is ``||f~ - f||^2 / ||f||^2``, with `f` the block's output in the float network and `f~` the same block's
    output in the quantized network.

    Args:
        prepared: Calibrated, fake-quantization on.
        stage: The block, one of :func:`find_stages`.
        batches: Image batches `[B, C, S, S]`.
        rates: Learning rates, as they are.
        steps: Gradient steps, one batch each.
        seed: Of the order of the batches.

    Raises:
        CalibrationError: There are no images, or they do not reach the block.
    """
    calls = stage_calls(prepared, stage, batches)
    before = block_error(stage, calls)
    rest = trainable_rest(stage.module, stage.sites)
    learner = Learner(stage.sites, rates, steps, rest=rest, warm_up=_WARM_UP)
    kept = learner.snapshot()
    for index in torch.randint(len(calls), (steps,), generator=torch.Generator().manual_seed(seed)).tolist():
        learner.step(relative_error(stage, calls[index]))
    after = block_error(stage, calls)
    if not after < before:
        learner.restore(kept)
        after = before
    learner.finish()
    return BlockErrors(stage.name, before, after)


def stage_calls(prepared: PreparedModel, stage: Stage, batches: Sequence[Tensor]) -> list[StageCall]:
    """The block's inputs in the quantized network, with its output in the float network as what is wanted.

    Raises:
        CalibrationError: There are no images, or they do not reach the block.
    """
    if not len(batches):
        raise CalibrationError(
            f"There is nothing to bring through {stage.name}", found="0 batches", expected="one or more"
        )
    reference = float_reference(prepared)
    inputs, targets = (capture_stage(model, stage.name, batches) for model in (prepared, reference))
    return [StageCall(i.args, i.kwargs, t.output) for i, t in zip(inputs, targets, strict=True)]


def relative_error(stage: Stage, call: StageCall) -> Tensor:
    """Mean squared error of the block's output relative to the target's mean square; differentiable."""
    output = first_tensor(stage.module(*copy.deepcopy(call.args), **copy.deepcopy(call.kwargs)))  # it may write to them
    return F.mse_loss(output.float(), call.output.float()) / call.output.float().square().mean().clamp_min(1e-12)


@torch.no_grad()
def block_error(stage: Stage, calls: Sequence[StageCall]) -> float:
    """Mean of :func:`relative_error` over the calls."""
    return sum(float(relative_error(stage, call)) for call in calls) / len(calls)
