"""A report of the Triton kernel that computes each site of a model, and of the reason where it is not a fused one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn

from harmoq_ao.gpu_programs.kernels import AttentionCore, ChannelAttention, Linear, Mlp, WindowAttention
from harmoq_ao.gpu_programs.operands import AttentionSpec, Operands
from harmoq_ao.gpu_programs.program import make_program
from harmoq_ao.kernels.select import select_kernel
from harmoq_ao.programs.record import Unrecordable
from harmoq_ao.sites.quantized import QuantizedLinear, QuantizedMatmul, QuantizedSite
from harmoq_ao.sites.report import Lowering

_ALONE = "part of nothing larger that one kernel computes"


def survey(
    model: nn.Module, sites: Mapping[str, QuantizedSite], example: Tensor, dtype: torch.dtype
) -> dict[str, Lowering]:
    """The kernel of each site on a GPU, found by making the program for one size; no GPU and no Triton run.

    Args:
        model: The model with its float parts in float32, on the CPU.
        sites: Its quantized sites by name.
        example: An image batch of the size.
        dtype: Type of tokens in memory.
    """
    found = {name: _single(site) for name, site in sites.items()}
    try:
        program = make_program(model, example, dtype, Operands())
    except Unrecordable as refusal:
        return {name: Lowering(low.kernel, f"the model runs as it is: {refusal}") for name, low in found.items()}
    names = {_key(site): name for name, site in sites.items() if _key(site) is not None}
    reasons = {names[key]: reason for match, reason in program.meta["missed"] for key in match if key in names}
    for name, reason in reasons.items():
        found[name] = Lowering(found[name].kernel, reason)
    for kernel, keys in _computed(program):
        for name in (names[key] for key in keys if key in names):
            fused = kernel != "triton lowbit_linear"
            found[name] = Lowering(kernel, None if fused else found[name].reason)
    return found


def _single(site: QuantizedSite) -> Lowering:
    """The kernel that a site has by itself on a GPU."""
    kernel = select_kernel(site.contraction(), torch.device("cuda"), "auto")
    return Lowering(kernel.name, kernel.refusal or _ALONE)


def _key(site: QuantizedSite) -> int | None:
    """What tells a site in a program: the memory of its codes, or of its first range."""
    if isinstance(site, QuantizedLinear):
        return site.codes.data_ptr()
    if isinstance(site, QuantizedMatmul) and site.left_bounds is not None:
        return site.left_bounds.data_ptr()
    return None


def _computed(program: fx.GraphModule) -> Iterator[tuple[str, list[int]]]:
    """Kernels of a program with the sites that each computes."""
    for module in program.children():
        if isinstance(module, WindowAttention):
            yield "triton window_attention", [*(site.key for site in module.sites), *_products(module.spec)]
        elif isinstance(module, AttentionCore):
            yield "triton attention", _products(module.spec)
        elif isinstance(module, ChannelAttention):
            yield "triton channel_attention", list(module.products)
        elif isinstance(module, Mlp):
            yield "triton mlp", [site.key for site in module.sites]
        elif isinstance(module, Linear):
            yield "triton lowbit_linear", [module.site.key]


def _products(spec: AttentionSpec) -> list[int]:
    return list(spec.products)
