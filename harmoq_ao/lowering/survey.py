"""Which Triton kernel computes each site of a model, and why not a fused one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from harmoq_ao.graph import is_island, island_state
from harmoq_ao.kernels.select import select_kernel
from harmoq_ao.lowering.attention_core import LoweredCores
from harmoq_ao.lowering.fusing import Misfit, recognising
from harmoq_ao.lowering.mlp import find_mlp, fused_mlp
from harmoq_ao.lowering.window_attention import LoweredAttention
from harmoq_ao.sites.quantized import QuantizedLinear, QuantizedMatmul, QuantizedSite
from harmoq_ao.sites.report import Lowering


def survey(model: nn.Module, sites: Mapping[str, QuantizedSite], run: Callable[[], object]) -> dict[str, Lowering]:
    """What each site runs on a GPU, found by one run of an example, on any device and without Triton running.

    Sites that the example does not reach have the kernel of a single linear.

    Args:
        model: The converted model.
        sites: Its quantized sites by name.
        run: Runs it on an example image.
    """
    backends = {site: site.backend for site in sites.values()}
    try:
        for site in backends:
            site.backend = "auto"
        with recognising():
            run()
    finally:
        for site, backend in backends.items():
            site.backend = backend
    found = {name: _single(site) for name, site in sites.items()}
    names = {id(site): name for name, site in sites.items()}
    for module in model.modules():
        for kernel, parts, reason in _fused(module):
            for part in parts:
                name = names.get(id(part))
                if name is not None:
                    found[name] = Lowering(kernel) if reason is None else Lowering(found[name].kernel, reason)
    return found


def _single(site: QuantizedSite) -> Lowering:
    """The kernel that a site has by itself on a GPU."""
    kernel = select_kernel(site.contraction(), torch.device("cuda"), "auto")
    return Lowering(kernel.name, kernel.refusal or "part of no module that a fused kernel computes")


def _fused(module: nn.Module) -> list[tuple[str, list[nn.Module], str | None]]:
    """Fused kernels that were tried on a module: name, its sites, and why it was not taken."""
    mlp = fused_mlp(module)
    if mlp is not None and (mlp.taken or mlp.reason is not None):
        return [("triton mlp", [module.get_submodule(mlp.fc1), module.get_submodule(mlp.fc2)], mlp.reason)]
    if not is_island(module):
        return _unfused_mlp(module)
    runs = (variant.run for variant in island_state(module).all_variants())
    return [row for run in runs for row in _rows(module, run)]


_Row = tuple[str, list[nn.Module], str | None]


def _unfused_mlp(module: nn.Module) -> list[_Row]:
    """Why a module of two linears is no MLP that is fused."""
    linears: list[nn.Module] = [m for m in module.children() if isinstance(m, QuantizedLinear) and m.both_quantized]
    if len(linears) != 2 or fused_mlp(module) is not None:
        return []
    try:
        find_mlp(module)
    except Misfit as misfit:
        return [("triton mlp", linears, f"its module is no MLP: {misfit}")]
    return []


def _rows(module: nn.Module, run: Any) -> list[_Row]:
    """What fused kernels found of one graph of an island."""
    if isinstance(run, LoweredAttention):
        inner, reason = _rows(module, run.variant.run), run.state(module).reason
        if run.sites(module):
            return [("triton window_attention", _named(module, run.sites(module)), None)]
        if reason is None:
            return inner
        within = [part for _, parts, _ in inner for part in parts]
        sites: list[nn.Module] = [m for m in module.modules() if isinstance(m, QuantizedSite) and m not in within]
        return [("triton window_attention", sites, reason), *inner]
    if not isinstance(run, LoweredCores):
        return []
    if run.sites(module):
        return [("triton attention", _named(module, run.sites(module)), None)]
    products: list[nn.Module] = [m for m in module.modules() if isinstance(m, QuantizedMatmul)]
    return [("triton attention", products, run.miss(module))] if run.miss(module) is not None else []


def _named(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [module.get_submodule(name) for name in names]
