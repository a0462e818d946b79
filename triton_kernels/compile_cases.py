"""The specialisations that `compile_gate` compiles: kernels at the shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import lowbit_linear, quantize
from .operands import COLUMN_GROUP, container_bits


@dataclass(frozen=True)
class Case:
    """A kernel and its arguments.

    Attributes:
        name: Unique, ``kernel / variant``.
        kernel: The jitted function.
        arguments: By name: ``"*fp32"`` (a pointer), ``"i32"``, ``"fp32"``; anything else is a constant.
        integer_mma: Whether int8 tensor-core instructions are expected.
        num_warps: Warps of a program.
        num_stages: Pipeline depth.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    integer_mma: bool = True
    num_warps: int = 4
    num_stages: int = 2


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row of weights."""
    return (columns + -columns % COLUMN_GROUP) * container_bits(bits) // 8


def _quantize_cases() -> Iterator[Case]:
    for name, norm, packed, bits in (("static 8 bit", False, False, 8), ("layernorm 4 bit packed", True, True, 4)):
        arguments = {
            "x_ptr": "*fp16", "reciprocal_ptr": "*fp32", "offset_ptr": "*fp32", "codes_ptr": "*u8", "M": "i32",
            "x_stride": "i32", "reciprocal_stride": 1, "offset_stride": 1, "eps": "fp32", "K": 60,
            "ROW_BYTES": 60 * bits // 8, "BITS": bits, "PACKED": packed, "NORM": norm, "BLOCK_M": 64, "BLOCK_K": 64,
        }  # fmt: skip
        yield Case(f"quantize / {name}", quantize.quantize_kernel, arguments, integer_mma=False)
    arguments = {
        "x_ptr": "*fp16", "reciprocal_ptr": "*fp32", "codes_ptr": "*u8", "lower_ptr": "*fp32", "step_ptr": "*fp32",
        "M": "i32", "x_stride": "i32", "K": 60, "BITS": 8, "BLOCK_M": 64, "BLOCK_K": 64,
    }  # fmt: skip
    yield Case("quantize / per token 8 bit", quantize.quantize_tokens_kernel, arguments, integer_mma=False)


def _linear_cases() -> Iterator[Case]:
    variants = (
        ("swinir-light qkv", 60, 180, "static", "*fp16"),
        ("hat-s qkv", 144, 432, "static", "*fp16"),
        ("swinir-light fc1 per token", 60, 120, "token", "*fp32"),
        ("hat-s fc2 codes", 288, 144, "codes", "*u8"),
    )
    for name, columns, rows, mode, x_type in variants:
        for bits in (2, 3, 4, 8):
            yield _linear_case(f"lowbit_linear / {name} w{bits}", columns, rows, mode, x_type, bits)


def _linear_case(name: str, columns: int, rows: int, mode: str, x_type: str, bits: int) -> Case:
    token = mode == "token"
    arguments = {
        "x_ptr": x_type, "weight_ptr": "*u8", "start_ptr": "*i32", "scale_ptr": "*fp32", "constant_ptr": "*fp32",
        "total_ptr": "*fp32" if token else None, "reciprocal_ptr": None if mode == "codes" else "*fp32",
        "offset_ptr": "*fp32" if mode == "static" else None, "lower_ptr": None, "step_ptr": None,
        "residual_ptr": "*fp16" if mode == "codes" else None, "out_reciprocal_ptr": None, "out_offset_ptr": None,
        "out_ptr": "*fp16", "M": "i32", "x_stride": "i32", "residual_stride": "i32", "K": columns, "N": rows,
        "ROW_BYTES": row_bytes(columns, bits), "WEIGHT_BITS": bits, "MID_RISE": bits < 8, "ACT_BITS": 8,
        "INPUT": mode, "GELU": "erf" if token else "none", "OUT_BITS": 0, **lowbit_linear.tile(rows, columns),
    }  # fmt: skip
    return Case(name, lowbit_linear.lowbit_linear_kernel, arguments)


CASES: tuple[Case, ...] = (*_quantize_cases(), *_linear_cases())


__all__ = ["CASES", "Case", "row_bytes"]
