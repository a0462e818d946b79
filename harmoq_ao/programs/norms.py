"""Norms over the channels of a token that authors spell out: ``(x - mean) / sqrt(variance + eps)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


@dataclass(frozen=True)
class SpelledNorm:
    """``factor * (x - mean) / sqrt(variance + eps)``, with the variance of all entries.

    Attributes:
        source: Node of x.
        axis: The axis of mean and variance.
        eps: Added to the variance.
        factor: 1, unless the author's variance is that of a sample.
    """

    source: fx.Node
    axis: int
    eps: float
    factor: float


def match_norm(node: fx.Node) -> SpelledNorm | None:
    """The norm that a division, or a product with a reciprocal root, completes; None where it is another."""
    if len(node.args) != 2 or node.kwargs:
        return None
    centred, root = node.args
    reciprocal = node.target is _aten.mul.Tensor
    if not _is(root, _aten.rsqrt.default if reciprocal else _aten.sqrt.default) or not _is(centred, _aten.sub.Tensor):
        return None
    total: Any = root.args[0]  # type: ignore[union-attr]
    mean = _mean_of(centred)
    if mean is None or not _is(total, _aten.add.Tensor) or not isinstance(total.args[1], float):
        return None
    (source, axis), eps = mean, total.args[1]
    size = source.meta["shape"][axis]
    correction = _correction(total.args[0], source, axis)
    if correction is None or correction >= size:
        return None
    share = (size - correction) / size
    return SpelledNorm(source, axis, eps * share, math.sqrt(share))


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _along(node: Any, size: int) -> int | None:
    """The only axis that a reduction keeps with length one."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])
    return axes[0] % size if keeps and isinstance(axes, (list, tuple)) and len(axes) == 1 else None


def _mean_of(centred: Any) -> tuple[fx.Node, int] | None:
    """What is centred by its own mean along an axis, and the axis."""
    if not _is(centred, _aten.sub.Tensor) or centred.kwargs:
        return None
    source, mean = centred.args
    if not _is(mean, _aten.mean.dim) or mean.args[0] is not source or "shape" not in source.meta:
        return None
    axis = _along(mean, len(source.meta["shape"]))
    return None if axis is None else (source, axis)


def _correction(variance: Any, source: fx.Node, axis: int) -> int | None:
    """By how much less than the number of entries a variance divides; None where it is no variance of the source."""
    if _is(variance, _aten.var.correction):
        own = variance.args[0] is source and _along(variance, len(source.meta["shape"])) == axis
        correction = variance.kwargs.get("correction")
        return None if not own else 1 if correction is None else int(correction)
    if not _is(variance, _aten.mean.dim) or _along(variance, len(source.meta["shape"])) != axis:
        return None
    square: Any = variance.args[0]
    twice = _is(square, _aten.mul.Tensor) and square.args[0] is square.args[1]
    if not twice and not (_is(square, _aten.pow.Tensor_Scalar) and square.args[1] == 2):
        return None
    return 0 if _mean_of(square.args[0]) == (source, axis) else None
