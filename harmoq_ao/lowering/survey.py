"""A report of the Triton kernel that computes each site of a model, and of the reason where it is not a fused one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from harmoq_ao.graph.exchange import Finding, Replacement, replacement_of
from harmoq_ao.kernels.select import select_kernel
from harmoq_ao.lowering.fusing import Misfit, recognising
from harmoq_ao.lowering.mlp import find_mlp
from harmoq_ao.sites.quantized import QuantizedLinear, QuantizedSite
from harmoq_ao.sites.report import Lowering


def survey(model: nn.Module, sites: Mapping[str, QuantizedSite], run: Callable[[], object]) -> dict[str, Lowering]:
    """The kernel of each site on a GPU, found by running one example on any device, without Triton.

    Sites that the example does not reach are reported as single linears.

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
        replacement = replacement_of(module, Replacement)
        findings = _unfused_mlp(module) if replacement is None else replacement.findings(module)
        for finding in findings:
            for name in (names[id(site)] for site in finding.sites if id(site) in names):
                kernel = finding.kernel if finding.reason is None else found[name].kernel
                found[name] = Lowering(kernel, finding.reason)
    return found


def _single(site: QuantizedSite) -> Lowering:
    """The kernel that a site has by itself on a GPU."""
    kernel = select_kernel(site.contraction(), torch.device("cuda"), "auto")
    return Lowering(kernel.name, kernel.refusal or "part of no module that a fused kernel computes")


def _unfused_mlp(module: nn.Module) -> list[Finding]:
    """Why a module of two quantized linears is not fused as an MLP."""
    linears: list[nn.Module] = [m for m in module.children() if isinstance(m, QuantizedLinear) and m.both_quantized]
    if len(linears) != 2:
        return []
    try:
        find_mlp(module)
    except Misfit as misfit:
        return [Finding("triton mlp", linears, f"its module is no MLP: {misfit}")]
    return []
