"""The repeated blocks of a network, and what goes in and out of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedLinear

_SITES_OF_A_BLOCK = 3  # fewer are parts of one: the branches of an attention, a perceptron


@dataclass(frozen=True)
class Stage:
    """One block of a network, such as a transformer block.

    Args:
        name: Qualified name of its module.
        module: The module.
        sites: Its sites in execution order.
    """

    name: str
    module: nn.Module
    sites: tuple[PreparedSite, ...]


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


def find_stages(prepared: PreparedModel) -> list[Stage]:
    """The innermost blocks that hold three or more sites, a linear layer among them, and stand in a list of modules.

    Disjoint, in execution order of their first sites. Sites between blocks belong to none.
    """
    order = {id(site): index for index, site in enumerate(prepared.sites())}
    stages = _blocks(prepared.model, "", False, order)
    return sorted(stages, key=lambda stage: order[id(stage.sites[0])])


def _blocks(module: nn.Module, name: str, listed: bool, order: dict[int, int]) -> list[Stage]:
    inner: list[Stage] = []
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        inner += _blocks(child, path, isinstance(module, (nn.ModuleList, nn.Sequential)), order)
    if inner or not listed:
        return inner
    sites = [m for m in module.modules() if isinstance(m, PreparedSite)]
    if len(sites) < _SITES_OF_A_BLOCK or not any(isinstance(s, PreparedLinear) for s in sites):
        return []
    return [Stage(name, module, tuple(sorted(sites, key=lambda site: order[id(site)])))]


def capture_stage(model: PreparedModel, name: str, images: Sequence[Tensor]) -> list[StageCall]:
    """Run image batches `[B, C, H, W]` up to a stage and through it; the first call for each.

    Raises:
        CalibrationError: An image does not reach the stage.
    """
    calls: list[StageCall] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(StageCall(_detached(args), _detached(kwargs), first_tensor(output).detach()))
        raise _ReachedError

    handle = model.model.get_submodule(name).register_forward_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            for image in images:
                _run_until_reached(model, image, name)
    finally:
        handle.remove()
    return calls


class _ReachedError(Exception):
    """Ends a forward pass after the stage: nothing behind it is needed."""


def _run_until_reached(model: PreparedModel, image: Tensor, name: str) -> None:
    try:
        model(image)
    except _ReachedError:
        return
    raise CalibrationError(f"An image of shape {tuple(image.shape)} does not reach {name}")


def first_tensor(output: Any) -> Tensor:
    """The output of a module; of a tuple or list the first tensor."""
    if isinstance(output, Tensor):
        return output
    return first_tensor(output[0])


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(v) for v in value)
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    return value
