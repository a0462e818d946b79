"""A limit on what a model's constructor may allocate and compute: hyperparameters of a file cannot be trusted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

MAX_CONSTRUCTION_BYTES = 4 << 30
"""Bytes that a model's constructor may allocate in total (spandrel's largest, AuraSR: 2.3 GiB)."""
MAX_CONSTRUCTION_OPS = 100_000
"""Tensor operations that a model's constructor may issue (the longest of spandrel's published models: 8,500)."""


class ConstructionBudget(TorchDispatchMode):
    """Context manager that counts operations and bytes, and raises `MemoryError` before one that exceeds the limits.

    Sizes are computed on the meta device. A whole constructor cannot run there, because it may read values of tensors
    (`linspace(...).item()`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0
        self._ops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Iterating over a tensor unbinds it: one operation, but as many tensors as there are entries.
        self._ops += args[0].shape[args[1] if len(args) > 1 else 0] if func is torch.ops.aten.unbind.int else 1
        self._bytes += _result_bytes(func, args, kwargs)
        if self._bytes > MAX_CONSTRUCTION_BYTES or self._ops > MAX_CONSTRUCTION_OPS:
            raise MemoryError(
                f"construction has taken {self._bytes >> 20} MiB and {self._ops} operations so far; "
                f"the limits are {MAX_CONSTRUCTION_BYTES >> 20} MiB and {MAX_CONSTRUCTION_OPS} operations"
            )
        return func(*args, **kwargs)


def _result_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of the new tensors that `func` would return; 0 for views, in-place operations and what meta cannot run."""
    if all(result.alias_info is not None for result in func._schema.returns):
        return 0
    meta_args, meta_kwargs = _pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        meta_kwargs = {**meta_kwargs, "device": torch.device("meta")}
    meta_kwargs.pop("generator", None)
    try:
        results = func(*meta_args, **meta_kwargs)
    except Exception:  # it reads values, has no meta kernel, or wrong arguments, which the call itself reports
        return 0
    return sum(r.numel() * r.element_size() for r in _pytree.tree_leaves(results) if isinstance(r, Tensor))
