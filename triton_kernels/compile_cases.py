"""The specialisations that `compile_gate` compiles: kernels at the shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton.language as tl

from harmoq_ao.triton_kernels import attention, lowbit_linear, mlp, quantize, window_attention
from harmoq_ao.triton_kernels.operands import COLUMN_GROUP, container_bits


@dataclass(frozen=True)
class Case:
    """A kernel and its arguments.

    Attributes:
        name: Unique, ``kernel / variant``.
        kernel: The jitted function.
        arguments: By name: ``"*fp32"`` (a pointer), ``"i32"``, ``"fp32"``; anything else is a constant.
        integer_mma: Whether int8 tensor-core instructions are expected.
        unfused: Whether no fused multiply-add may occur. True where nothing but codes is computed; correctly rounded
            division and the error function are made of fused multiply-adds.
        num_warps: Warps of a program.
        num_stages: Pipeline depth.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    integer_mma: bool = True
    unfused: bool = False
    num_warps: int = 4
    num_stages: int = 2


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row of weights."""
    return (columns + -columns % COLUMN_GROUP) * container_bits(bits) // 8


def _quantize_cases() -> Iterator[Case]:
    for name, norm, bits in (("static 8 bit", False, 8), ("layernorm 4 bit", True, 4)):
        arguments = {
            "x_ptr": "*fp16", "reciprocal_ptr": "*fp32", "offset_ptr": "*fp32", "codes_ptr": "*u8", "M": "i32",
            "x_stride": "i32", "eps": "fp32", "K": 60, "BITS": bits, "NORM": norm, "BLOCK_M": 64, "BLOCK_K": 64,
        }  # fmt: skip
        yield Case(f"quantize / {name}", quantize.quantize_kernel, arguments, integer_mma=False, unfused=not norm)


def _linear_cases() -> Iterator[Case]:
    all_bits, some_bits = (2, 3, 4, 8), (4, 8)
    variants = (
        ("swinir-light qkv", 60, 180, "static", "*fp16", all_bits),
        ("hat-s qkv", 144, 432, "static", "*fp16", some_bits),
        ("swinir-light fc1 per token", 60, 120, "token", "*fp32", some_bits),
        ("hat-s proj codes", 144, 144, "codes", "*u8", all_bits),
    )
    for name, columns, rows, mode, x_type, widths in variants:
        for bits in widths:  # unpacking differs by width
            yield _linear_case(f"lowbit_linear / {name} w{bits}", columns, rows, mode, x_type, bits)


def _linear_case(name: str, columns: int, rows: int, mode: str, x_type: str, bits: int) -> Case:
    arguments = {
        "x_ptr": x_type, "weight_ptr": "*u8", "start_ptr": "*i32", "scale_ptr": "*fp32", "constant_ptr": "*fp32",
        "total_ptr": "*fp32" if mode == "token" else None, "reciprocal_ptr": None if mode == "codes" else "*fp32",
        "offset_ptr": "*fp32" if mode == "static" else None, "residual_ptr": "*fp16" if mode == "codes" else None,
        "out_ptr": "*fp16", "M": "i32", "x_stride": "i32", "residual_stride": "i32", "K": columns, "N": rows,
        "INPUT": mode, **lowbit_linear.tile(rows, columns), **_linear_constants(columns, bits),
    }  # fmt: skip
    return Case(name, lowbit_linear.lowbit_linear_kernel, arguments)


def _mlp_cases() -> Iterator[Case]:
    for bits in (2, 3, 4, 8):
        yield _mlp_case(f"mlp / swinir-light w{bits}", 60, 120, bits)
    for bits in (4, 8):
        yield _mlp_case(f"mlp / hat-s w{bits}", 144, 288, bits)
    yield _mlp_case("mlp / dat-light w4", 60, 120, 4, norm=False, gelu="tanh")


def _mlp_case(name: str, channels: int, hidden: int, bits: int, norm: bool = True, gelu: str = "erf") -> Case:
    sizes, warps = mlp.tile(channels, hidden, channels)
    arguments = {
        "x_ptr": "*fp16", "residual_ptr": "*fp16", "out_ptr": "*fp16", "M": "i32", "x_stride": "i32",
        "residual_stride": "i32", "eps": "fp32", "C": channels, "HIDDEN": hidden, "OUT": channels,
        "GELU": gelu, "NORM": norm, **_two_linears(channels, hidden, bits), **sizes,
    }  # fmt: skip
    return Case(name, mlp.mlp_kernel, arguments, num_warps=warps, num_stages=1)


_LINEAR_POINTERS = {
    "weight": "*u8", "start": "*i32", "scale": "*fp32", "constant": "*fp32", "reciprocal": "*fp32", "offset": "*fp32",
}  # fmt: skip


def _linear_constants(columns: int, bits: int, suffix: str = "") -> dict[str, Any]:
    """As `PackedLinear.constants`, with activations of 8 bits."""
    values = {"ROW_BYTES": row_bytes(columns, bits), "BITS": bits, "MID_RISE": bits < 8, "ACT_BITS": 8}
    return {f"{name}{suffix}": value for name, value in values.items()}


def _two_linears(columns1: int, columns2: int, bits: int) -> dict[str, Any]:
    """Pointers and constants of both linears of a fused kernel."""
    pointers = {f"{tensor}{layer}_ptr": kind for layer in "12" for tensor, kind in _LINEAR_POINTERS.items()}
    return pointers | _linear_constants(columns1, bits, "1") | _linear_constants(columns2, bits, "2")


def _window_cases() -> Iterator[Case]:
    for bits in (2, 3, 4, 8):
        yield _window_case(f"window / swinir-light w{bits}", 60, 6, bits)
    yield _window_case("window / swinir-light paper w4", 60, 6, 4, paper=True)
    relative = _window_case("window / swinir-light paper relative w4", 60, 6, 4, paper=True)
    yield replace(relative, arguments=relative.arguments | {"RELATIVE": True})
    yield _window_case("window / swin2sr-light cosine w4", 60, 6, 4, cosine=True)


def _window_case(name: str, channels: int, heads: int, bits: int, paper: bool = False, cosine: bool = False) -> Case:
    arguments = {
        "x_ptr": "*fp16", **_attention_arguments(channels, heads, 64, paper, cosine), "eps": "fp32", "C": channels,
        "NORM": True, "residual_ptr": None, "OUT": channels, **_two_linears(channels, heads * 32, bits),
        **window_attention.tile(channels, channels),
    }  # fmt: skip
    return Case(name, window_attention.window_kernel, arguments, num_warps=8 if paper else 4, num_stages=1)


def _attention_cases() -> Iterator[Case]:
    for name, channels, paper, out_bits, tokens, keys in (
        ("hat-s 16x16", 144, False, 8, 256, 256), ("hat-s 16x16 paper", 144, True, 8, 256, 256),
        ("hat-s overlapping paper", 144, True, 0, 256, 576), ("dat-light 8x32", 60, False, 0, 256, 256),
        ("dat-light 8x32 paper", 60, True, 0, 256, 256), ("craft 8x8 paper", 60, True, 0, 64, 64),
    ):  # fmt: skip
        arguments = _attention_arguments(channels, 6, tokens, paper, cosine=False) | {"KEYS": keys}
        if paper and not out_bits:
            arguments["SCORES"] = "products"
        strides = (f"{part}{axis}_stride" for part in ("", "key_") for axis in ("window", "token", "head"))
        arguments |= dict.fromkeys(strides, "i32")
        arguments |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp32" if paper else "*fp16")
        arguments |= dict.fromkeys(("reciprocal_ptr", "offset_ptr"), "*fp32" if out_bits else None)
        arguments |= {"out_ptr": "*u8" if out_bits else "*fp16", "OUT_BITS": out_bits}
        warps = 8 if paper else 4
        arguments |= attention.tile(tokens, warps)
        kernel = attention.attention_kernel
        case = Case(f"attention / {name}", kernel, arguments, integer_mma=paper, num_warps=warps, num_stages=1)
        yield case
        if name == "dat-light 8x32 paper":
            yield replace(case, name=f"{case.name} relative", arguments=arguments | {"RELATIVE": True})


def _attention_arguments(channels: int, heads: int, tokens: int, paper: bool, cosine: bool) -> dict[str, Any]:
    """Arguments that `window_kernel` and `attention_kernel` have in common."""
    head_dim = channels // heads
    quantizers = "*fp32" if paper else None
    return {
        "score_scale_ptr": "*fp32", "bias_ptr": "*fp32", "mask_ptr": "*fp32", "factors_ptr": quantizers,
        "bounds_ptr": quantizers, "out_ptr": "*fp16", "masks": "i32",
        "TOKENS": tokens, "HEADS": heads, "HEAD_DIM": head_dim, "PADDED": 16 if head_dim <= 16 and not paper else 32,
        "LEFT_BITS": 8 if paper else 0, "RIGHT_BITS": 8 if paper else 0, "RELATIVE": False,
        "SCORES": "cosine" if cosine else "scaled", "DTYPE": tl.float16,
    }  # fmt: skip


CASES: tuple[Case, ...] = (
    *_quantize_cases(),
    *_linear_cases(),
    *_mlp_cases(),
    *_window_cases(),
    *_attention_cases(),
)


__all__ = ["CASES", "Case", "row_bytes"]
