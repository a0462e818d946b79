"""Inspection of quantized models: groups of sites, attention maps, outputs of layers, changes of weights."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import SiteRule
from harmoq_ao.harmonization.stages import find_stages
from harmoq_ao.quant.relative_maps import relative_rows
from harmoq_ao.sites.prepared import PreparedLinear, PreparedMatmul
from harmoq_ao.sites.site import Site

PRODUCTS = "attention products"
OFF = 32
_KINDS = {
    "query, key, value": re.compile(r"(^|[._])(to_?)?(qkv|kv|q|k|v|query|key|value)$"),
    "projection": re.compile(r"(^|[._])(proj|to_out|out_proj|out)([._]\d+)?$"),
    "MLP (GELU)": re.compile(r"(^|[._])(mlp|ffn|fc1|fc2|linear1|linear2|net)([._]|$)"),
}
"""Linear layers by the end of their names, as authors of transformers choose them."""
_SMALLEST_MAP = 16  # tokens; attention among fewer shows nothing


def layer_groups(prepared: h.PreparedModel) -> dict[str, list[Site]]:
    """Sites by function and by depth; a site is in up to two groups, empty groups are left out.

    Attention products, the linears before and after them, the perceptrons; and the first and the last third of the
    blocks.
    """
    sites = [m.site for m in prepared.sites()]
    groups = {PRODUCTS: [site for site in sites if site.kind == "matmul"]}
    taken: set[str] = set()
    for title, pattern in _KINDS.items():
        linears = (site for site in sites if site.kind == "linear" and site.name not in taken)
        groups[title] = [site for site in linears if pattern.search(site.module_name)]
        taken |= {site.name for site in groups[title]}
    stages = find_stages(prepared)
    third = len(stages) // 3
    if third:
        groups["shallow blocks"] = [m.site for stage in stages[:third] for m in stage.sites]
        groups["deep blocks"] = [m.site for stage in stages[-third:] for m in stage.sites]
    return {title: found for title, found in groups.items() if found}


def only(sites: Sequence[Site], weight_bits: int, act_bits: int) -> tuple[SiteRule, ...]:
    """Rules that quantize these sites and nothing else; both operands of a product are activations."""
    rest = SiteRule("*", weight_bits=OFF, act_bits=OFF)
    right = {"linear": weight_bits, "conv2d": weight_bits, "matmul": act_bits}
    chosen = (SiteRule(glob.escape(s.name), weight_bits=right[s.kind], act_bits=act_bits) for s in sites)
    return (rest, *chosen)


def linear_sites(prepared: h.PreparedModel) -> list[PreparedLinear]:
    """Linear sites in execution order."""
    return [m for m in prepared.sites() if isinstance(m, PreparedLinear)]


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionMaps:
    """The same attention map in several models.

    Args:
        site: Name of the product it enters.
        maps: `[M, M]` by name of the model.
    """

    site: str
    maps: dict[str, Tensor]


@torch.no_grad()
def attention_maps(prepared: h.PreparedModel, image: Tensor) -> dict[str, Tensor]:
    """Maps `[n, M, M]`, one for each window and head, that enter the attention-value products, rounded as there.

    Only maps among at least 16 tokens, in execution order; attention among channels or between different tokens is left
    out.

    Args:
        prepared: Where fake-quantization is on, maps are rounded.
        image: `[1, C, H, W]`.
    """
    seen: dict[str, Tensor] = {}

    def keep(module: PreparedMatmul, operands: tuple[Any, ...]) -> None:
        left = module.form.canonical(*operands)[0].detach()
        if left.shape[-1] == left.shape[-2] >= _SMALLEST_MAP:
            if module.act_quantizer is not None and module.act_quantizer.active:
                left = module.act_quantizer(relative_rows(left) if module.relative else left, None)
                left = left / left.sum(-1, keepdim=True) if module.relative else left
            seen[module.site.name] = left.reshape(-1, *left.shape[-2:]).float().cpu()

    products = [m for m in prepared.sites() if isinstance(m, PreparedMatmul) and m.site.role == "attention-value"]
    with ExitStack() as stack:
        for module in products:
            stack.callback(module.register_forward_pre_hook(keep).remove)
        prepared(image)
    return seen


def compare_attention(
    exact: h.PreparedModel, quantized: Mapping[str, h.PreparedModel], image: Tensor, site: str | None = None
) -> AttentionMaps | None:
    """One map, the one with most contrast in the float model, in all models; None where there is no such attention.

    Args:
        exact: With fake-quantization off.
        quantized: By name.
        image: `[1, C, H, W]`.
        site: The product; the middle one by default.

    Raises:
        ConfigError: There is no such product.
    """
    wanted = attention_maps(exact, image)
    if not wanted:
        return None
    name = list(wanted)[len(wanted) // 2] if site is None else site
    if name not in wanted:
        raise ConfigError("This site has no attention map", found=name, expected=", ".join(wanted))
    index = int(wanted[name].flatten(1).std(1).argmax())
    others = {title: attention_maps(model, image)[name][index] for title, model in quantized.items()}
    return AttentionMaps(name, {"float": wanted[name][index], **others})


# --- outputs and weights ----------------------------------------------------------------------------------------------


@torch.no_grad()
def site_outputs(prepared: h.PreparedModel, images: Tensor) -> dict[str, Tensor]:
    """Output of every linear site by name, in execution order, for images `[B, C, H, W]`."""
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[name] = output.detach().float()

        return keep

    with ExitStack() as stack:
        for module in linear_sites(prepared):
            stack.callback(module.register_forward_hook(keeper(module.site.name)).remove)
        prepared(images)
    return kept


def relative_errors(reached: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """``||y~ - y|| / ||y||`` by site."""
    return {name: float((reached[name] - y).norm() / y.norm().clamp_min(1e-12)) for name, y in wanted.items()}


def weight_changes(prepared: h.PreparedModel, exact: h.PreparedModel) -> dict[str, Tensor]:
    """``W' - W`` by linear site, `[m, K]`, with `W` of a model that still has the float weights."""
    original = {site.site.name: site.weight.detach() for site in linear_sites(exact)}
    present = {site.site.name: site.weight.detach() for site in linear_sites(prepared)}
    return {name: (weight - original[name]).float().cpu() for name, weight in present.items() if name in original}
