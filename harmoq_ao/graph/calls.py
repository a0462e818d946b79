"""The arguments of an island's calls: their calling pattern, copies for a trial, and results compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from harmoq_ao.common.structure import entries_of, tensors_in
from harmoq_ao.graph.variant import BY_VALUE


@dataclass(frozen=True, eq=False)
class Unknown:
    """An argument of a call that is compared by identity; held, so that its identity is not given to another object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unknown:
        return self


def dynamic_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], list[Any], Any]:
    """Split call arguments into (dynamic leaves, calling pattern, tree); the pattern decides which graph fits."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    dynamic: list[Any] = []
    pattern: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            twin = next(i for i, other in enumerate(leaves) if other is leaf)  # forward may ask ``query is key``
            dynamic.append(leaf)
            pattern.append(("tensor", leaf.dim(), leaf.dtype, leaf.device.type, twin))
        elif type(leaf) in (int, float):
            dynamic.append(leaf)
            pattern.append(type(leaf))
        else:
            pattern.append((type(leaf), leaf) if isinstance(leaf, BY_VALUE) else Unknown(leaf))
    return dynamic, pattern, tree


def leaf_shapes(leaves: Any) -> tuple[Any, ...]:
    """Shapes of tensors, and numbers as they are: what tells two calls of one pattern apart."""
    return tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)


@contextmanager
def same_random(structure: Any) -> Iterator[None]:
    """Context manager that puts the random generators back where they were."""
    tensors = [t for t in pytree.tree_leaves(structure) if isinstance(t, torch.Tensor) and t.device.type == "cuda"]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=sorted({t.device.index for t in tensors})):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def copies(leaves: list[Any]) -> list[Any]:
    """Leaves with tensors cloned; one that occurs twice stays one."""
    clones = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return [clones.get(id(leaf), leaf) for leaf in leaves]


def copy_structure(structure: Any) -> Any:
    """A nested structure with its tensors cloned."""
    leaves, tree = pytree.tree_flatten(structure)
    return pytree.tree_unflatten(copies(leaves), tree)


def same_values(expected: Any, actual: Any) -> bool:
    """Whether two nested results hold the same tensors and numbers, in the same structure; NaN equals NaN."""
    first, first_tree = pytree.tree_flatten(expected)
    second, second_tree = pytree.tree_flatten(actual)
    return first_tree == second_tree and all(_same_leaf(a, b) for a, b in zip(first, second, strict=True))


def _same_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        if type(a) is type(b) and tensors_in(a):  # an object of the author's
            first, second = entries_of(a) or {}, entries_of(b) or {}
            return list(first) == list(second) and all(same_values(first[name], second[name]) for name in first)
        return type(a) is type(b) and bool(a is b or a == b or (a != a and b != b))
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
