"""MLPs (linear, GELU, linear) as one chain of blocks on CPUs, where no program runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from harmoq_ao.graph import is_island
from harmoq_ao.graph.exchange import Replacement, exchange, original_class, replacement_of
from harmoq_ao.kernels import onednn_mlp
from harmoq_ao.kernels.select import preferred_family
from harmoq_ao.lowering.fusing import Misfit, is_traced
from harmoq_ao.lowering.probing import probe, random_results
from harmoq_ao.sites.quantized import QuantizedLinear

_ROWS = (3, 5)
_KINDS = {"erf": "none", "tanh": "tanh"}


@dataclass
class FusedMlp(Replacement):
    """A module that is ``fc2(gelu(fc1(x)))``, run as one chain of blocks on a CPU.

    Args:
        fc1: Name of the first linear.
        fc2: Name of the second linear.
        gelu: ``erf`` or ``tanh``.
    """

    fc1: str
    fc2: str
    gelu: str

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fused result, or that of the author's forward."""
        fused = self._fused(module, args[0]) if len(args) == 1 and not kwargs and not module.training else None
        return original_class(module).forward(module, *args, **kwargs) if fused is None else fused

    def _fused(self, module: nn.Module, x: Tensor) -> Tensor | None:
        fc1, fc2 = module.get_submodule(self.fc1), module.get_submodule(self.fc2)
        assert isinstance(fc1, QuantizedLinear)
        assert isinstance(fc2, QuantizedLinear)
        if not _is_chained(module, fc1, x):
            return None
        chain = fc1.integer_linear().packed_onednn(), fc2.integer_linear().packed_onednn()
        return onednn_mlp.mlp(x, *chain, _KINDS[self.gelu]) if onednn_mlp.takes(*chain) else None


def _is_chained(module: nn.Module, fc1: QuantizedLinear, x: Tensor) -> bool:
    """Whether a call is one for the CPU's chain. Within it no module is called, so there must be no hook to miss it."""
    if preferred_family(x.device, fc1.backend) != "cpu" or is_traced():
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.children())
    return x.dtype in (torch.float32, torch.bfloat16) and not hooked


def find_mlp(module: nn.Module) -> FusedMlp:
    """Recognise ``fc2(gelu(fc1(x)))``, dropouts and identities aside.

    The author's forward must trace without a branch, and give what the formula gives with random numbers for both
    linears.

    Raises:
        Misfit: Not an MLP; the message explains why.
    """
    if is_island(module):
        raise Misfit("its own forward contracts")
    linears = {name: child for name, child in module.named_children() if isinstance(child, QuantizedLinear)}
    if len(linears) != 2 or not all(linear.both_quantized for linear in linears.values()):
        raise Misfit("not two quantized linears")
    graph = _straight_graph(module)
    order = [node.target for node in graph.nodes if node.op == "call_module" and node.target in linears]
    if sorted(order) != sorted(linears):
        raise Misfit("its linears are not called once each")
    fc1, fc2 = (str(name) for name in order)
    for kind, approximate in _KINDS.items():
        if all(_is_formula(module, graph, linears[fc1].columns, approximate, rows) for rows in _ROWS):
            return FusedMlp(fc1, fc2, kind)
    raise Misfit("there is more than a GELU between or around its linears")


def _straight_graph(module: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(module)
    except Exception as error:  # an author's forward may fail on proxies in any way
        raise Misfit(f"its forward does not trace: {type(error).__name__}: {error}") from error


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _is_formula(module: nn.Module, graph: fx.Graph, columns: int, approximate: str, rows: int) -> bool:
    """Whether random results of both linears go through a GELU alone, and nothing else is done to input or output."""
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(rows))
    try:
        calls, output = probe(module, graph, [x], random_results(rows + 1))
        first, second = (call for call in calls if call.kind == "linear")
        found = *first.inputs, *second.inputs, output
        expected = x, F.gelu(first.output, approximate=approximate), second.output
        return len(found) == 3 and all(map(torch.equal, found, expected))
    except Exception:  # whatever an author's code does with other shapes than its own
        return False


def fuse_mlps(model: nn.Module) -> None:
    """Let every MLP of `model` run as one chain; its parts keep their names."""
    for module in list(model.modules()):
        if replacement_of(module, Replacement) is None:
            with suppress(Misfit):
                exchange(module, find_mlp(module))
