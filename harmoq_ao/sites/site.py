"""A site is one contraction with two operands; its name is stable and does not depend on the image size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: A linear or convolution (activation, weight), or a product of two activations.
SiteKind = Literal["linear", "conv2d", "matmul"]
#: What a product of activations does in attention, if that is known.
Role = Literal["query-key", "attention-value", "other"]


@dataclass
class Site:
    """One contraction of a model.

    Args:
        name: Qualified name of the module; for a function call the module it stands in, ``::``, the operation and its
            index there (``layers.0.blocks.1.attn::matmul_0``).
        path: Qualified name of the module that executes the site in the prepared model.
        kind: ``linear``, ``conv2d`` or ``matmul``.
        shape: Weight shape ``(N, K)``; for a product of activations the contracted length ``(K,)``, 0 where it depends
            on the image.
        role: For a product of activations, what it does.
        location: ``file:line`` of the call, for function calls.
        macs: Multiply-accumulates on the example input.
        reason: Why the site stays in float, or None.
        sqnr_db: Signal to quantization noise of its output on calibration samples, in dB, once calibrated.
    """

    name: str
    path: str
    kind: SiteKind
    shape: tuple[int, ...]
    role: Role | None = None
    location: str | None = None
    macs: int = 0
    reason: str | None = None
    sqnr_db: float | None = None

    @property
    def module_name(self) -> str:
        """Qualified name of the author's module the site belongs to."""
        return self.name.partition("::")[0]


@dataclass
class FloatSite:
    """A contraction that was found and deliberately stays as the author wrote it.

    Args:
        name: Qualified name of the module.
        kind: ``linear``, ``conv2d``, ``matmul`` or ``module``.
        reason: Why.
        macs: Multiply-accumulates on the example input, where known.
    """

    name: str
    kind: str
    reason: str
    macs: int = 0
