"""Modules that are linear, GELU, linear, and what runs them in one: a kernel on GPUs, a chain of blocks on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from harmoq_ao.common.errors import KernelError
from harmoq_ao.graph import is_island
from harmoq_ao.graph.exchange import exchange_class
from harmoq_ao.kernels import onednn_mlp
from harmoq_ao.kernels.select import preferred_family
from harmoq_ao.lowering.fusing import Misfit, is_recognising, is_traced, runs_triton
from harmoq_ao.sites.quantized import QuantizedLinear

_ROWS = (3, 5)
_KINDS = {"erf": "none", "tanh": "tanh"}


class FusedMlp:
    """What a module that is ``fc2(gelu(fc1(x)))`` keeps beside itself.

    Args:
        fc1: Name of the first linear.
        fc2: Name of the second linear.
        gelu: ``erf`` or ``tanh``.

    Attributes:
        reason: Why the fused kernel does not take it, once that was tried; None if it does.
        taken: Whether the fused kernel took a call.
    """

    def __init__(self, fc1: str, fc2: str, gelu: str) -> None:
        self.fc1, self.fc2, self.gelu = fc1, fc2, gelu
        self.reason: str | None = None
        self.taken = False

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The fused result, or None where the module's own forward is to run."""
        fc1, fc2 = module.get_submodule(self.fc1), module.get_submodule(self.fc2)
        assert isinstance(fc1, QuantizedLinear)
        assert isinstance(fc2, QuantizedLinear)
        if torch.compiler.is_compiling() and not self.taken:
            return None  # only what an eager call has tried
        if _is_chained(module, fc1, x):
            chain = fc1.integer_linear().packed_onednn(), fc2.integer_linear().packed_onednn()
            return onednn_mlp.mlp(x, *chain, _KINDS[self.gelu]) if onednn_mlp.takes(*chain) else None
        trying = is_recognising()
        if self.reason is not None or not (trying or runs_triton(fc1, (x,))):
            return None
        from harmoq_ao.triton_kernels import mlp, ops

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        try:
            packed = fc1.integer_linear().packed_triton(), fc2.integer_linear().packed_triton()
            mlp.check_operands(rows, *packed, self.gelu, None)
        except KernelError as error:
            self.reason = str(error)
            return None
        self.taken = True
        if trying:
            return None
        launch = ops.mlp if torch.compiler.is_compiling() else mlp.launch_mlp
        return launch(rows, *packed, gelu=self.gelu).reshape(*x.shape[:-1], packed[1].rows)


def _is_chained(module: nn.Module, fc1: QuantizedLinear, x: Tensor) -> bool:
    """Whether a call is one for the CPU's chain. Within it no module is called, so there must be no hook to miss it."""
    if preferred_family(x.device, fc1.backend) != "cpu" or is_traced() or is_recognising():
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.children())
    return x.dtype in (torch.float32, torch.bfloat16) and not hooked


def find_mlp(module: nn.Module) -> FusedMlp:
    """Recognise ``fc2(gelu(fc1(x)))``, dropouts and identities aside.

    The author's forward must trace without a branch, and give what the formula gives with random numbers for both
    linears.

    Raises:
        Misfit: It is none; says why.
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
        if all(_is_formula(module, graph, fc1, fc2, approximate, rows) for rows in _ROWS):
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


@torch.no_grad()
def _is_formula(module: nn.Module, graph: fx.Graph, fc1: str, fc2: str, approximate: str, rows: int) -> bool:
    first, second = module.get_submodule(fc1), module.get_submodule(fc2)
    assert isinstance(first, QuantizedLinear)
    assert isinstance(second, QuantizedLinear)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, first.columns, generator=generator)
    hidden, output = (torch.randn(2, rows, s.site.shape[0], generator=generator) for s in (first, second))
    stand_ins = {fc1: _StandIn(x, hidden), fc2: _StandIn(F.gelu(hidden, approximate=approximate), output)}
    probe = _Probe(fx.GraphModule(module, graph), stand_ins)
    try:
        result = probe.run(x)
    except Exception:  # whatever an author's code does with other shapes than its own
        return False
    met = all(stand_in.met for stand_in in stand_ins.values())
    return met and isinstance(result, Tensor) and torch.equal(result, output)


class _StandIn:
    """Returns a given result and notes whether its input was the expected one."""

    def __init__(self, expected: Tensor, result: Tensor) -> None:
        self.expected, self.result, self.met = expected, result, False

    def __call__(self, x: Tensor) -> Tensor:
        self.met = x.shape == self.expected.shape and torch.equal(x, self.expected)
        return self.result


class _Probe(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, stand_ins: dict[str, _StandIn]) -> None:
        super().__init__(module)
        self.stand_ins = stand_ins

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self.stand_ins:
            return self.stand_ins[target](*args, **kwargs)
        return super().call_module(target, args, kwargs)


# --- in a model -------------------------------------------------------------------------------------------------------

_KEY = "_harmoq_mlp"


def fuse_mlps(model: nn.Module) -> None:
    """Let every MLP of `model` run fused where its sites choose Triton; its parts keep their names."""
    for module in list(model.modules()):
        if _KEY in module.__dict__:
            continue
        try:
            found = find_mlp(module)
        except Misfit:
            continue
        exchange_class(module, "Fused", lambda cls: {"forward": _forward, "harmoq_forward": cls.forward})
        module.__dict__[_KEY] = found


def fused_mlp(module: nn.Module) -> FusedMlp | None:
    """What :func:`fuse_mlps` found of a module."""
    found: FusedMlp | None = module.__dict__.get(_KEY)
    return found


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    found = fused_mlp(self)  # a slice of a sequence is of its class, and none
    if found is not None and len(args) == 1 and not kwargs and not self.training:
        fused = found(self, args[0])
        if fused is not None:
            return fused
    return self.harmoq_forward(*args, **kwargs)  # type: ignore[operator]
