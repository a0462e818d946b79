"""Calls that contract two operands: how they are recognised, and the forms they can take."""

from __future__ import annotations

import math
import operator
import string
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

#: Functions whose call is a contraction of two operands, by the name the site gets.
CONTRACTION_FUNCTIONS: dict[Any, str] = {
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.Tensor.matmul: "matmul",
    torch.Tensor.__matmul__: "matmul",
    torch.bmm: "bmm",
    torch.Tensor.bmm: "bmm",
    torch.mm: "mm",
    torch.Tensor.mm: "mm",
    torch.baddbmm: "baddbmm",
    torch.Tensor.baddbmm: "baddbmm",
    torch.einsum: "einsum",
    torch.functional.einsum: "einsum",
    F.scaled_dot_product_attention: "sdpa",
    F.linear: "linear",
    F.conv2d: "conv2d",
    torch.conv2d: "conv2d",
}

#: The same operations called as tensor methods.
CONTRACTION_METHODS: dict[str, str] = {
    "matmul": "matmul",
    "__matmul__": "matmul",
    "bmm": "bmm",
    "mm": "mm",
    "baddbmm": "baddbmm",
}


def contraction_op(kind: str, target: Any) -> str | None:
    """Name of the contraction that an FX node of this kind and target issues, or None."""
    if kind == "call_method":
        return CONTRACTION_METHODS.get(target)
    if kind == "call_function":
        try:
            return CONTRACTION_FUNCTIONS.get(target)
        except TypeError:  # an unhashable callable is nobody's contraction
            return None
    return None


@dataclass(frozen=True)
class SourceKey:
    """Where in its author's source a contraction stands; stable across graphs of the same module.

    Args:
        function: Qualified name of the function that issues the call.
        line: Line of the call, counted from the function's first line.
        occurrence: How often the same line was reached before in the same forward (loops).
    """

    function: str
    line: int
    occurrence: int


@dataclass(frozen=True)
class Contraction:
    """One contraction met while tracing.

    Args:
        op: ``matmul``, ``bmm``, ``mm``, ``baddbmm``, ``einsum``, ``sdpa``, ``linear`` or ``conv2d``.
        key: Where it stands.
        args: Example values of the positional arguments, tensors included.
        kwargs: Example values of the keyword arguments.
        left_is_softmax: The left operand comes out of a softmax (an attention map).
        depends_on_input: Whether any operand depends on the island's arguments; position-bias tables do not.
        weight: Path of the parameter that is the right operand of a ``linear``, if it is one.
        computed_weight: Value of the right operand of a ``linear``, if it is computed from parameters alone.
        location: ``file:line`` for messages.
    """

    op: str
    key: SourceKey
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    left_is_softmax: bool
    depends_on_input: bool
    weight: str | None
    computed_weight: torch.Tensor | None
    location: str


@dataclass(frozen=True)
class EinsumForm:
    """A two-operand einsum as a batched matrix product.

    Operands are permuted and flattened to ``[B, M, K]`` and ``[B, K, N]``; the product ``[B, M, N]`` is unflattened
    and permuted back. Labels that only one operand carries in front of the output count as M or N.
    """

    left: str
    right: str
    batch: str
    rows: str
    columns: str
    contracted: str
    output: str

    def operands(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Canonical operands ``[B, M, K]`` and ``[B, K, N]``."""
        sizes = self._sizes(a, b)
        a = a.expand([sizes[c] for c in self.left])
        b = b.expand([sizes[c] for c in self.right])
        left = a.permute([self.left.index(c) for c in self.batch + self.rows + self.contracted])
        right = b.permute([self.right.index(c) for c in self.batch + self.contracted + self.columns])
        groups = self.batch, self.rows, self.contracted, self.columns
        batch, m, k, n = (math.prod(sizes[c] for c in group) for group in groups)
        return left.reshape(batch, m, k), right.reshape(batch, k, n)

    def result(self, product: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Output of the einsum from the canonical product ``[B, M, N]``."""
        sizes = self._sizes(a, b)
        labels = self.batch + self.rows + self.columns
        full = product.reshape([sizes[c] for c in labels])
        return full.permute([labels.index(c) for c in self.output])

    def _sizes(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, int]:
        """Size of each label; as in torch, one operand may have 1 where the other has more."""
        sizes: dict[str, int] = {}
        for label, size in (*zip(self.left, a.shape, strict=True), *zip(self.right, b.shape, strict=True)):
            sizes[label] = max(size, sizes.get(label, 1)) if size else 0
        return sizes


def einsum_form(equation: str) -> EinsumForm | None:
    """The batched-matmul form of an einsum equation, or None where it has none.

    None for an ellipsis, another number of operands than two, a repeated label in one operand (a diagonal), no
    contracted label, or a label that is summed over in one operand alone.
    """
    equation = equation.replace(" ", "")
    if "..." in equation or equation.count(",") != 1 or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    if any(len(set(labels)) != len(labels) for labels in (left, right, output)):
        return None
    shared = [c for c in left if c in right]
    batch = "".join(c for c in shared if c in output)
    contracted = "".join(c for c in shared if c not in output)
    rows = "".join(c for c in left if c not in right)
    columns = "".join(c for c in right if c not in left)
    summed_alone = any(c not in output for c in rows + columns)
    if not contracted or summed_alone or set(output) != set(batch + rows + columns):
        return None
    return EinsumForm(left, right, batch, rows, columns, contracted, output)


def is_einops_einsum(function: Any) -> bool:
    """Whether a function is ``einops.einsum``, which comes down to torch's."""
    return getattr(function, "__name__", "") == "einsum" and getattr(function, "__module__", "").startswith("einops.")


def einsum_letters(pattern: str) -> str:
    """The equation of torch's einsum for one of ``einops.einsum``, whose axes are words."""
    letters: dict[str, str] = {}

    def letter(axis: str) -> str:
        return axis if axis == "..." else letters.setdefault(axis, string.ascii_letters[len(letters)])

    sides = [[part.split() for part in side.split(",")] for side in pattern.split("->")]
    return "->".join(",".join("".join(map(letter, axes)) for axes in side) for side in sides)


def contraction_macs(op: str, args: tuple[Any, ...], output: torch.Tensor) -> int:
    """Multiply-accumulate operations of one call, from its operands and output."""
    if op == "sdpa":
        q, k, v = args[:3]
        return int(q.numel() * k.shape[-2] + q.numel() // q.shape[-1] * k.shape[-2] * v.shape[-1])
    if op == "conv2d":
        weight = args[1]
        return int(output.numel() * weight[0].numel())
    if op == "einsum":
        form = einsum_form(args[0])
        if form is None:
            return 0
        a, b = args[1] if isinstance(args[1], (tuple, list)) else args[1:3]
        sizes = dict(zip(form.left, a.shape, strict=True)) | dict(zip(form.right, b.shape, strict=True))
        return math.prod(sizes.values())
    left = args[1] if op == "baddbmm" else args[0]
    return int(output.numel() * left.shape[-1])
