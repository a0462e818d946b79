"""One block of a network at a time: its inputs in the quantized network, and its float output as the target."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.harmonization.run_until import run_until_stopped, stop_forward
from harmoq_ao.harmonization.stages import Stage, first_tensor
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.sites.model import PreparedModel


class StageCall(NamedTuple):
    """One execution of a stage, detached.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: Its output; of a tuple the first tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def capture_stage(model: PreparedModel, name: str, images: Sequence[Tensor]) -> list[StageCall]:
    """Run image batches `[B, C, H, W]` up to a stage and through it; the first call for each.

    Raises:
        CalibrationError: An image does not reach the stage.
    """
    calls: list[StageCall] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(StageCall(_detached(args), _detached(kwargs), first_tensor(output).detach()))
        stop_forward()

    with model.model.get_submodule(name).register_forward_hook(record, with_kwargs=True), torch.no_grad():
        for image in images:
            if not run_until_stopped(model, image):
                raise CalibrationError(f"An image of shape {tuple(image.shape)} does not reach {name}")
    return calls


def stage_calls(prepared: PreparedModel, teacher: Teacher, stage: Stage, batches: Sequence[Tensor]) -> list[StageCall]:
    """The block's inputs in the quantized network, with its output in the float network as the target.

    Args:
        prepared: Calibrated, fake-quantization on.
        teacher: The float network.
        stage: The block, one of :func:`find_stages`.
        batches: Image batches `[B, C, S, S]`.

    Raises:
        CalibrationError: There are no images, or they do not reach the block.
    """
    if not len(batches):
        raise CalibrationError(f"No images to run through {stage.name}", found="0 batches", expected="one or more")
    inputs, targets = (capture_stage(model, stage.name, batches) for model in (prepared, teacher.exact))
    return [StageCall(i.args, i.kwargs, t.output) for i, t in zip(inputs, targets, strict=True)]


def relative_error(stage: Stage, call: StageCall) -> Tensor:
    """Mean squared error of the block's output relative to the target's mean square; differentiable."""
    output = first_tensor(stage.module(*copy.deepcopy(call.args), **copy.deepcopy(call.kwargs)))  # it may write to them
    return F.mse_loss(output.float(), call.output.float()) / call.output.float().square().mean().clamp_min(1e-12)


def snapshot(stage: Stage) -> dict[str, Tensor]:
    """Copies of a block's weights and ranges, by name."""
    return {name: tensor.detach().clone() for name, tensor in _learned(stage).items()}


@torch.no_grad()
def restore(stage: Stage, kept: Mapping[str, Tensor]) -> None:
    """Return to a snapshot."""
    for name, tensor in _learned(stage).items():
        tensor.copy_(kept[name])


def _learned(stage: Stage) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site in stage.sites:
        path = site.site.path
        for index, quantizer in enumerate(site.quantizers()):
            found |= {f"{path}.{index}.lower": quantizer.lower, f"{path}.{index}.upper": quantizer.upper}
        if site.own_weight is not None:
            found[f"{path}.weight"] = site.own_weight
    return found


@torch.no_grad()
def block_error(stage: Stage, calls: Sequence[StageCall]) -> float:
    """Mean of :func:`relative_error` over the calls."""
    return sum(float(relative_error(stage, call)) for call in calls) / len(calls)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(v) for v in value)
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    return value
