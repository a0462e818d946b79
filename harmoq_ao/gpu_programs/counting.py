"""What a program launches and moves, counted on tensors without values that say they are on a GPU.

A launch is an operator that makes a tensor in memory; views are none. What it moves is the memory of its operands and
results, each once: what a kernel reads again from the cache is not counted, nor what it need not read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from harmoq_ao.gpu_programs.kernels import AttentionCore, ChannelAttention, Mlp, WindowAttention, Windows

FUSED = (WindowAttention, AttentionCore, ChannelAttention, Mlp)
"""What counts as a fused island."""

_OURS = ("window_attention", "attention", "channel_sums", "channel_product", "mlp", "fused_linear")
_SAME_MEMORY = {torch.ops.aten.lift_fresh.default, torch.ops.aten.detach.default}


@dataclass
class Count:
    """What a forward does.

    Attributes:
        launches: Number of kernels, as far as operators tell.
        moved: Bytes read and written.
        masks: Bytes of region ids.
        operators: Number of calls by name.
        fused: Number of fused islands by name.
        types: Type of the first operand of each kind of our kernels.
    """

    launches: int = 0
    moved: int = 0
    masks: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    fused: Counter[str] = field(default_factory=Counter)
    types: dict[str, set[torch.dtype]] = field(default_factory=dict)


class _Counting(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [leaf for leaf in pytree.arg_tree_leaves(*args, **(kwargs or {})) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.is_view or not results or func in _SAME_MEMORY or "empty" in str(func):
            return result
        self._add(str(func), operands, results)
        return result

    def _add(self, name: str, operands: list[Tensor], results: list[Tensor]) -> None:
        memory = {t.untyped_storage()._cdata for t in operands}
        fresh = [t for t in results if t.untyped_storage()._cdata not in memory]
        if not fresh and not name.split(".")[1].endswith("_"):
            return  # a contiguous tensor asked to be contiguous
        read = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in operands}
        # an expanded tensor is read once, however large it looks
        self.count.moved += sum(_bytes(t) for t in (*read.values(), *results))
        self.count.launches += 1
        self.count.operators[name] += 1
        kernel = name.split(".")[1]
        if name.startswith("harmoq.") and kernel in _OURS:
            self.count.types.setdefault(kernel, set()).add(operands[0].dtype)


def _bytes(tensor: Tensor) -> int:
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride else 1
    return entries * tensor.element_size()


def count_program(program: fx.GraphModule, shape: tuple[int, ...]) -> Count:
    """Count what a program does on a GPU; its tensors lose their values.

    Args:
        program: From `make_program`; not to be used afterwards.
        shape: Of the image batch.
    """
    count = Count()
    tables = {id(m.regions): m.regions for m in program.modules() if isinstance(m, Windows) and m.regions is not None}
    count.masks = sum(table.tensor.numel() * table.tensor.element_size() for table in tables.values())
    count.fused = Counter(type(m).__name__ for m in program.children() if isinstance(m, FUSED))
    with FakeTensorMode() as mode, torch.no_grad():
        program._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
        image = torch.empty(shape, device="cuda")
        with mode, _Counting(count):
            program(image)
    return count
