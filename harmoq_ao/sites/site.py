"""A site is one contraction with two operands; its name is stable and does not depend on the image size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.config import SiteSettings

#: A linear or convolution (activation, weight), or a product of two activations.
SiteKind = Literal["linear", "conv2d", "matmul"]
#: What a product of activations does in attention, if that is known.
Role = Literal["query-key", "attention-value", "other"]


class FloatCause(StrEnum):
    """What kept a contraction in float.

    SETTINGS: The profile, a rule, or a width of 16 or 32 bits.
    CONSTANT: No operand depends on the image (position-bias networks); conversion folds it to a constant.
    UNSUPPORTED: There is no integer form of it.
    UNREACHED: No example image reached it.
    UNTRACED: It lies in a module or call that cannot be traced.
    """

    SETTINGS = "settings"
    CONSTANT = "constant"
    UNSUPPORTED = "unsupported"
    UNREACHED = "unreached"
    UNTRACED = "untraced"


@dataclass(frozen=True)
class FloatReason:
    """Why a contraction stays in float.

    Args:
        cause: What decides how the contraction is treated.
        text: What users read.
    """

    cause: FloatCause
    text: str

    def __str__(self) -> str:
        return self.text

    def at(self, location: str) -> FloatReason:
        """The same reason with the place in the source."""
        return replace(self, text=f"{self.text} ({location})")


CONSTANT = FloatReason(FloatCause.CONSTANT, "does not depend on the image; folded to a constant at convert")
"""The reason of every contraction that no image reaches."""


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
        unit_length: For a product of activations, whether the contracted length depends on the image and both operands
            are normalized to length one along it, as queries and keys of attention among channels are.
    """

    name: str
    path: str
    kind: SiteKind
    shape: tuple[int, ...]
    role: Role | None = None
    location: str | None = None
    macs: int = 0
    reason: FloatReason | None = None
    sqnr_db: float | None = None
    unit_length: bool = False

    @property
    def module_name(self) -> str:
        """Qualified name of the author's module the site belongs to."""
        return self.name.partition("::")[0]

    @property
    def is_functional(self) -> bool:
        """Whether the author wrote a function call rather than a module."""
        return "::" in self.name

    def wants_joint_scale(self, settings: SiteSettings) -> bool:
        """Whether a joint scale `[K]` is defined: both operands quantized, contracted length fixed."""
        if settings.joint_scale == "none" or not settings.both_quantized:
            return False
        return self.kind == "linear" or (self.kind == "matmul" and self.role == "query-key" and self.shape[0] > 0)

    def wants_joint_shift(self, settings: SiteSettings) -> bool:
        """Whether a joint shift `[K]` is defined: a linear with a joint scale, a static range and under 8 bits.

        At 256 levels its effect is invisible, and its vectors would add one percent to a saved model.
        """
        linear = self.kind == "linear" and settings.joint_shift and not settings.act.dynamic and settings.act.bits < 8
        return linear and self.wants_joint_scale(settings)

    def wants_relative_map(self, settings: SiteSettings) -> bool:
        """Whether the left operand is an attention map to be quantized relative to its rows' largest entries."""
        static = settings.both_quantized and not settings.act.dynamic
        return settings.relative_maps and self.role == "attention-value" and static

    def wants_rms(self, settings: SiteSettings) -> bool:
        """Whether static ranges are to hold for operands of a root mean square of one, whatever the image's size."""
        return settings.rms_ranges and self.unit_length and settings.both_quantized and not settings.act.dynamic

    def check_length(self, left: Tensor, joint_scale: Tensor | None) -> None:
        """Check the contracted length of a product with a joint scale.

        Args:
            left: Left operand `[..., M, K]`.
            joint_scale: `[K]`, or None: then any length will do.

        Raises:
            KernelError: Its contracted length is not that of the joint scale: it depends on the image.
        """
        if joint_scale is not None and left.shape[-1] != len(joint_scale):
            raise KernelError(
                f"{self.name} contracts over another length than in calibration",
                found=left.shape[-1],
                expected=len(joint_scale),
                remedy="prepare with example_inputs of two image sizes, so that this length is seen to depend on the "
                "image",
            )


@dataclass
class FloatSite:
    """A contraction that was found and deliberately stays as the author wrote it.

    Args:
        name: Qualified name of the module.
        kind: ``linear``, ``conv2d``, ``matmul`` or ``conv`` (another convolution).
        reason: Why.
        macs: Multiply-accumulates on the example input, where known.
    """

    name: str
    kind: str
    reason: FloatReason
    macs: int = 0
