"""Discovery of the modules that issue contractions themselves, by running the model once on a small example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from harmoq_ao.graph.contractions import CONTRACTION_FUNCTIONS, contraction_macs

#: Modules that are sites themselves: their own functional call is not an island's.
SITE_MODULES = (nn.Linear, nn.Conv2d)


@dataclass
class Discovery:
    """Islands, calls and costs seen in one or several forwards.

    Args:
        islands: Qualified names of modules that issue contractions other than convolutions themselves.
        calls: Linear and convolution modules in execution order, with the number of calls of each.
        macs: Multiply-accumulates by qualified name (for islands: their own calls).
    """

    islands: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)

    def add(self, later: Discovery) -> None:
        """Add what only another run showed."""
        self.islands += [name for name in later.islands if name not in self.islands]
        self.calls = later.calls | self.calls
        self.macs = later.macs | self.macs


class _Recorder(TorchFunctionMode):
    def __init__(self, stack: list[tuple[str, nn.Module]], found: Discovery) -> None:
        super().__init__()
        self.stack = stack
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        op = "attention" if name == "multi_head_attention_forward" else CONTRACTION_FUNCTIONS.get(func)
        if op is None or not self.stack:
            return output
        qualname, module = self.stack[-1]
        bound = tuple(args) + tuple((kwargs or {}).values())
        if op != "attention" and isinstance(output, torch.Tensor):
            macs = contraction_macs(op, bound, output)
            self.found.macs[qualname] = self.found.macs.get(qualname, 0) + macs
        if op != "conv2d" and type(module) not in SITE_MODULES and qualname not in self.found.islands:
            self.found.islands.append(qualname)
        return output


@contextmanager
def discovering(model: nn.Module) -> Iterator[Discovery]:
    """Context manager that records what each run of the model shows.

    Args:
        model: The float model, in evaluation mode.
    """
    found = Discovery()
    stack: list[tuple[str, nn.Module]] = []
    with _module_stack(model, stack, found), _Recorder(stack, found):
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
