"""Passes over a model whose tensors are final: constants are folded, and one kernel replaces several sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from harmoq_ao.graph import Phase, finish_graphs, is_island, island_state
from harmoq_ao.graph.exchange import Replacement, exchange, original_class, replacement_of
from harmoq_ao.graph.folding import fold_variant
from harmoq_ao.graph.last_result import LastResult, remember
from harmoq_ao.graph.variant import Pass
from harmoq_ao.lowering.attention import fuse_attention
from harmoq_ao.lowering.mlp import FusedMlp, fuse_mlps

#: What each graph of a converted island goes through. Folding comes first, as constants would interrupt the chains of
#: nodes that make up an attention.
PASSES: tuple[Pass, ...] = (fold_variant, fuse_attention)


@dataclass(frozen=True)
class Exchanged:
    """Modules outside of islands whose forward is replaced in a converted model.

    Args:
        mlps: Of each fused MLP its name, those of its first and second linear within it, and the kind of its GELU.
        kept: Names of modules that keep their last result.
    """

    mlps: tuple[tuple[str, str, str, str], ...]
    kept: tuple[str, ...]


def exchanged_in(model: nn.Module) -> Exchanged:
    """The modules that finalizing exchanged."""
    replaced = [(name, replacement_of(module, Replacement)) for name, module in model.named_modules()]
    mlps = tuple((name, r.fc1, r.fc2, r.gelu) for name, r in replaced if isinstance(r, FusedMlp))
    return Exchanged(mlps, tuple(name for name, r in replaced if isinstance(r, LastResult)))


def finalize(model: nn.Module, constants: set[str], run: Callable[[], object], known: Exchanged | None = None) -> None:
    """Run all passes over a converted model, in place; again after its float type changed.

    Args:
        model: The author's model with quantized sites.
        constants: Names of its linears whose input does not depend on the image.
        run: Runs it on an example image.
        known: The modules to exchange, where that is known; then nothing is run.
    """
    if known is None:
        fuse_mlps(model)
    else:
        _exchange_mlps(model, known)
    for module in model.modules():
        if is_island(module):
            island_state(module).phase = Phase.CONVERTED  # sites observe no more, and differ from the author's forward
            finish_graphs(module, PASSES)
    kept = _still_called(model, constants, run) if known is None else map(model.get_submodule, known.kept)
    for module in kept:
        remember(module)


def _exchange_mlps(model: nn.Module, known: Exchanged) -> None:
    for name, fc1, fc2, gelu in known.mlps:
        module = model.get_submodule(name)
        if replacement_of(module, Replacement) is None:
            exchange(module, FusedMlp(fc1, fc2, gelu))


def _still_called(model: nn.Module, constants: set[str], run: Callable[[], object]) -> list[nn.Module]:
    """Modules outside of islands that still compute constants after folding; whole sequences where possible."""
    if not constants:
        return []
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda m, i, name=name: called.add(name))
        for name, module in model.named_modules()
        if name in constants
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, nn.Module] = {}
    for name in sorted(called):
        path = name.rpartition(".")[0]
        parent = model.get_submodule(path)
        linears = {f"{path}.{n}" for n, m in parent.named_modules() if original_class(m) is nn.Linear}
        whole = original_class(parent) is nn.Sequential and linears <= constants
        module = parent if whole else model.get_submodule(name)
        found[id(module)] = module
    return list(found.values())
