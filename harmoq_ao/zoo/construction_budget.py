"""A limit on what a model's constructor may allocate and compute: hyperparameters of a file cannot be trusted."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

MAX_CONSTRUCTION_BYTES = 4 << 30
"""Bytes that a model's constructor may allocate in total (spandrel's largest, AuraSR: 2.3 GiB)."""
MAX_CONSTRUCTION_OPS = 100_000
"""Tensor operations that a model's constructor may issue (the longest of spandrel's published models: 8,500)."""
_SMALL = 1 << 24
"""Values up to which a result is made first and counted then."""


_INITIALISERS = frozenset({torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default})
"""Operations that fill a tensor with random numbers."""


class ConstructionBudget(TorchDispatchMode):
    """Context manager that counts operations and bytes, and raises `MemoryError` before one that exceeds the limits.

    Sizes of results that may be large are computed on the meta device. A whole constructor cannot run there, because it
    may read values of tensors (`linspace(...).item()`).

    Args:
        random: Whether parameters are initialised with random numbers; else with zeros, which takes no time: for a
            model whose parameters are all about to be replaced.
    """

    def __init__(self, random: bool = True) -> None:
        super().__init__()
        self._bytes = 0
        self._ops = 0
        self._random = random

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Iterating over a tensor unbinds it: one operation, but as many tensors as there are entries.
        self._ops += args[0].shape[args[1] if len(args) > 1 else 0] if func is torch.ops.aten.unbind.int else 1
        if not self._random and func in _INITIALISERS:
            return args[0].zero_()
        if not _makes_tensors(func):
            self._check()
            return func(*args, **kwargs)
        small = _at_most(func, args, kwargs) <= _SMALL
        if not small:
            self._bytes += _result_bytes(func, args, kwargs)
        self._check()
        result = func(*args, **kwargs)
        if small:
            self._bytes += _bytes_of(result)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping this mode for its compiler, whose import takes as long as that of torch."""
        return False

    def _check(self) -> None:
        if self._bytes > MAX_CONSTRUCTION_BYTES or self._ops > MAX_CONSTRUCTION_OPS:
            raise MemoryError(
                f"construction has taken {self._bytes >> 20} MiB and {self._ops} operations so far; "
                f"the limits are {MAX_CONSTRUCTION_BYTES >> 20} MiB and {MAX_CONSTRUCTION_OPS} operations"
            )


@functools.cache
def _makes_tensors(func: Any) -> bool:
    """Whether an operation returns new tensors: it is no view, and not in place."""
    return any(result.alias_info is None for result in func._schema.returns)


def _at_most(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """A number of values that no result of a call exceeds.

    A result has no more values than its operands have pairs, triples and so on (products of matrices, indices), times
    the numbers that say how often they are repeated or by how much they are enlarged; a factor or a step below one
    counts by its inverse. Operands that are combined value by value are broadcast instead.
    """
    if torch.Tag.pointwise in func.tags:
        shapes = [reversed(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        # By hand: `torch.broadcast_shapes` imports sympy.
        return math.prod(max(sides) for sides in itertools.zip_longest(*shapes, fillvalue=1))
    bound = 1.0
    for value in (*args, *kwargs.values()):
        for leaf in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(leaf, Tensor):
                bound *= 1 + leaf.numel()
            elif type(leaf) in (int, float):
                size = abs(leaf)
                bound *= 1 + (max(size, 1 / size) if size else 0)
    return bound


def _result_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of the new tensors that `func` would return; 0 for what meta cannot run."""
    meta_args, meta_kwargs = _pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        meta_kwargs = {**meta_kwargs, "device": torch.device("meta")}
    meta_kwargs.pop("generator", None)
    try:
        results = func(*meta_args, **meta_kwargs)
    except Exception:  # it reads values, has no meta kernel, or wrong arguments, which the call itself reports
        return 0
    return _bytes_of(results)


def _bytes_of(results: Any) -> int:
    if isinstance(results, Tensor):
        return results.numel() * results.element_size()
    return sum(map(_bytes_of, results)) if isinstance(results, (list, tuple)) else 0
