"""Harmonization: joint scales that share the quantization error fairly between the two operands of a contraction."""

from harmoq_ao.harmonize.hso import (
    EXPONENTS,
    SCALE_LIMITS,
    ScaleChoice,
    compound_error,
    joint_scale,
    pair_scale,
    power_scale,
    quantized_operand,
    scalar_scale,
    search_exponent,
)
from harmoq_ao.harmonize.shift import joint_shift

__all__ = [
    "EXPONENTS",
    "SCALE_LIMITS",
    "ScaleChoice",
    "compound_error",
    "joint_scale",
    "joint_shift",
    "pair_scale",
    "power_scale",
    "quantized_operand",
    "scalar_scale",
    "search_exponent",
]
