"""Discovery of the modules that issue contractions themselves, by running the model once on a small example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from harmoq_ao.graph.contractions import CONTRACTION_FUNCTIONS, contraction_macs

#: Modules that are sites themselves: their own functional call is not an island's.
SITE_MODULES = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class FunctionCall:
    """A contraction that a module's own forward issued as a function call.

    Args:
        op: Name of the contraction, or of the function that no site is made of.
        macs: Multiply-accumulates.
        known: Whether it is one of :data:`CONTRACTION_FUNCTIONS`.
        convolution: Whether it convolves.
    """

    op: str
    macs: int
    known: bool = True
    convolution: bool = False


@dataclass
class Discovery:
    """Islands, calls and costs seen in one or several forwards.

    Args:
        islands: Qualified names of modules that issue contractions other than convolutions themselves.
        calls: Linear and convolution modules in execution order, with the number of calls of each.
        macs: Multiply-accumulates by qualified name (for islands: their own calls).
        functions: Contractions that each other module issued itself, by its qualified name, in order.
    """

    islands: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    functions: dict[str, list[FunctionCall]] = field(default_factory=dict)

    def add(self, later: Discovery) -> None:
        """Add what only another run showed."""
        self.islands += [name for name in later.islands if name not in self.islands]
        self.calls = later.calls | self.calls
        self.macs = later.macs | self.macs
        self.functions = later.functions | self.functions

    def note(self, qualname: str, call: FunctionCall) -> None:
        """Take note of a function call in a module's forward."""
        self.functions.setdefault(qualname, []).append(call)


class _Recorder(TorchFunctionMode):
    """Sees the functions that forwards call."""

    def __init__(self, stack: list[tuple[str, nn.Module]], found: Discovery) -> None:
        super().__init__()
        self.stack = stack
        self.found = found
        self.outermost: str | None = None  # of the functions that are running, and whether it is a known contraction
        self.known = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        op = "attention" if name == "multi_head_attention_forward" else CONTRACTION_FUNCTIONS.get(func)
        before = self.outermost, self.known
        self.outermost, self.known = self.outermost or name, self.known or op is not None
        try:
            output = func(*args, **(kwargs or {}))
        finally:
            self.outermost, self.known = before
        if op is not None and self.stack:
            self._note(op, tuple(args) + tuple((kwargs or {}).values()), output)
        return output

    def _note(self, op: str, bound: tuple[Any, ...], output: Any) -> None:
        qualname, module = self.stack[-1]
        own = type(module) not in SITE_MODULES
        if op != "attention" and isinstance(output, torch.Tensor):
            macs = contraction_macs(op, bound, output)
            self.found.macs[qualname] = self.found.macs.get(qualname, 0) + macs
            if own:
                self.found.note(qualname, FunctionCall(op, macs, convolution=op == "conv2d"))
        if op != "conv2d" and own and qualname not in self.found.islands:
            self.found.islands.append(qualname)


class _Beneath(TorchDispatchMode):
    """Sees the operators that compute: contractions of functions that no site is made of must not go unnoticed."""

    def __init__(self, above: _Recorder) -> None:
        super().__init__()
        self.above = above

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        cost = flop_registry.get(func.overloadpacket)
        if cost is not None and not self.above.known and self.above.stack:
            macs = cost(*args, **(kwargs or {}), out_val=output) // 2
            name = self.above.outermost or func.overloadpacket.__name__
            convolution = "convolution" in func.overloadpacket.__name__
            self.above.found.note(self.above.stack[-1][0], FunctionCall(name, macs, False, convolution))
        return output


@contextmanager
def discovering(model: nn.Module) -> Iterator[Discovery]:
    """Context manager that records what each run of the model shows.

    Args:
        model: The float model, in evaluation mode.
    """
    found = Discovery()
    stack: list[tuple[str, nn.Module]] = []
    above = _Recorder(stack, found)
    with _module_stack(model, stack, found), _Beneath(above), above:
        yield found


@contextmanager
def _module_stack(model: nn.Module, stack: list[tuple[str, nn.Module]], found: Discovery) -> Iterator[None]:
    """Context manager that keeps ``stack`` equal to the modules whose forward is running."""
    handles = []

    def enter(qualname: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            stack.append((qualname, module))
            if type(module) in SITE_MODULES:
                found.calls[qualname] = found.calls.get(qualname, 0) + 1

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()

    try:
        for qualname, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(qualname)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
