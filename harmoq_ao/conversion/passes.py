"""Passes over a model whose tensors are final: constants are folded, and one kernel replaces several sites."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from harmoq_ao.graph import Phase, finish_graphs, is_island, island_state
from harmoq_ao.graph.exchange import original_class
from harmoq_ao.graph.folding import fold_variant
from harmoq_ao.graph.last_result import remember
from harmoq_ao.graph.variant import Pass
from harmoq_ao.lowering.attention import fuse_attention
from harmoq_ao.lowering.core_rewriting import lower_cores
from harmoq_ao.lowering.mlp import fuse_mlps
from harmoq_ao.lowering.window_attention import lower_window_attention

#: What each graph of a converted island goes through. Folding comes first, as the others look for chains of nodes that
#: constants would interrupt; kernels for GPUs come last, as they are tried beside the graph that runs elsewhere.
PASSES: tuple[Pass, ...] = (fold_variant, fuse_attention, lower_cores, lower_window_attention)


def finalize(model: nn.Module, constants: set[str], run: Callable[[], object]) -> None:
    """Run all passes over a converted model, in place; again after its float type changed.

    Args:
        model: The author's model with quantized sites.
        constants: Names of its linears whose input does not depend on the image.
        run: Runs it on an example image.
    """
    fuse_mlps(model)
    for module in model.modules():
        if is_island(module):
            island_state(module).phase = Phase.CONVERTED  # sites observe no more, and differ from the author's forward
            finish_graphs(module, PASSES)
    for module in _still_called(model, constants, run):
        remember(module)


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
