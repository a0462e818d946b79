"""The repeated blocks of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harmoq_ao.common.structure import tensors_in
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedLinear

_SITES_OF_A_BLOCK = 3  # modules with fewer are parts of a block: the branches of an attention, an MLP


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


def find_stages(prepared: PreparedModel) -> list[Stage]:
    """The innermost members of module lists that hold three or more sites, a linear layer among them.

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


def first_tensor(output: Any) -> Tensor:
    """The output of a module; of a container or an object the first tensor in it."""
    return next(iter(tensors_in(output).values()))
