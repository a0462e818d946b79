"""The specialisations that `compile_gate` compiles: kernels at the shapes and types that real models launch.

Arguments are as the launcher sees them: bfloat16 models, pointers aligned as torch allocates, and integers that are
multiples of 16, as numbers of tokens and windows are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.triton_kernels import (
    attention,
    channel_attention,
    convolution,
    lowbit_linear,
    mlp,
    rowwise,
    window_attention,
)
from harmoq_ao.triton_kernels.launch import blocks, power_of_two
from harmoq_ao.triton_kernels.operands import padded_columns
from harmoq_ao.triton_kernels.rowwise import Chain, Op


@dataclass(frozen=True)
class Case:
    """A kernel and its arguments.

    Attributes:
        name: Unique, ``kernel / variant``.
        kernel: The jitted function.
        arguments: By name: ``"*fp32"`` (a pointer), ``"i32"``, ``"fp32"`` or a tuple of pointers; anything else is a
            constant.
        integer_mma: Whether int8 tensor-core instructions are expected.
        unfused: Whether no fused multiply-add may occur: nothing but exact codes and their epilogue is computed.
        num_warps: Warps of a program.
        num_stages: Pipeline depth.
        trips: How often the longest loop runs; 1 where there is none.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    integer_mma: bool = True
    unfused: bool = False
    num_warps: int = 4
    num_stages: int = 1
    trips: int = 1


_LINEAR_POINTERS = {
    "weight": "*i8", "start": "*i32", "scale": "*fp32", "constant": "*fp32", "reciprocal": "*fp32", "offset": "*fp32",
}  # fmt: skip


def _linear(columns: int, bits: int, layer: str = "", **changes: Any) -> dict[str, Any]:
    """Pointers and constants of a linear with mid-rise weights, doubled at 8 bits, and activations of 8 bits.

    Of 16 bits: bfloat16 weights and activations.
    """
    if bits == 16:
        changes = {"weight": "*bf16", **changes}
    pointers = {f"{tensor}{layer}_ptr": kind for tensor, kind in (_LINEAR_POINTERS | changes).items()}
    constants = {"ROW": padded_columns(columns), "DOUBLED": bits == 8, "ACT_BITS": 8 if bits <= 8 else 0}
    return pointers | {f"{name}{layer}": value for name, value in constants.items()}


def _linear_cases() -> Iterator[Case]:
    yield _linear_case("swinir-classical qkv w8", 180, 540, 8, "norm")
    yield _linear_case("hat-s qkv w8", 144, 432, 8, "norm")
    yield _linear_case("hat-s proj w4", 144, 144, 4, "codes", residual="*bf16")
    yield _linear_case("dat-light qkv w4", 60, 180, 4, "norm")
    yield _linear_case("dat-light fc1 w4", 60, 120, 4, "norm", gelu="erf")
    yield _linear_case("dat-light fc2 gated w8", 60, 60, 8, "static", gate="*bf16", residual="*bf16")
    yield _linear_case("swinir-light fc1 per token w4", 60, 120, 4, "token")


def _linear_case(
    name: str,
    columns: int,
    rows: int,
    bits: int,
    mode: str,
    gate: str | None = None,
    residual: str | None = None,
    gelu: str = "none",
) -> Case:
    sizes, warps = lowbit_linear.tile(rows, columns, mode == "norm")
    codes, token = mode == "codes", mode == "token"
    arguments = {
        "x_ptr": "*u8" if codes else "*bf16", "gate_ptr": gate, "total_ptr": "*fp32" if token else None,
        **_linear(columns, bits, reciprocal=None if codes else "*fp32", offset=None if codes or token else "*fp32"),
        "residual_ptr": residual, "out_ptr": "*bf16", "M": "i32", "eps": "fp32", "K": columns, "N": rows,
        "X_STRIDE": columns, "GATE_STRIDE": 2 * columns if gate else 0, "INPUT": mode, "GELU": gelu, **sizes,
    }  # fmt: skip
    return Case(
        f"lowbit_linear / {name}", lowbit_linear.lowbit_linear_kernel, arguments, unfused=mode in ("codes", "static"),
        num_warps=warps, trips=blocks(columns, sizes["BLOCK_K"]),
    )  # fmt: skip


def _mlp_cases() -> Iterator[Case]:
    yield _mlp_case("swinir-light w4", 60, 120, 4)
    yield _mlp_case("swinir-light w8", 60, 120, 8)
    yield _mlp_case("swin2sr-light w8", 60, 120, 8, norm=False, after=True)
    yield _mlp_case("hat-s w8", 144, 288, 8)
    yield _mlp_case("swinir-classical w8", 180, 360, 8)
    yield _mlp_case("swinir-light bf16 weights", 60, 120, 16)
    yield _mlp_case("no norm, no residual, tanh w4", 60, 120, 4, norm=False, gelu="tanh", residual=None)


def _mlp_case(
    name: str,
    channels: int,
    hidden: int,
    bits: int,
    norm: bool = True,
    after: bool = False,
    gelu: str = "erf",
    residual: str | None = "*bf16",
) -> Case:
    sizes, warps = mlp.tile(channels, hidden, channels, floats=bits == 16)
    arguments = {
        "x_ptr": "*bf16", "residual_ptr": residual, "out_ptr": "*bf16", "M": "i32", "eps": "fp32", "C": channels,
        "HIDDEN": hidden, "OUT": channels, "GELU": gelu, "NORM": norm, **_after(after),
        **_linear(channels, bits, "1"), **_linear(hidden, bits, "2"), **sizes,
    }  # fmt: skip
    trips = blocks(hidden, sizes["BLOCK_H"])
    return Case(f"mlp / {name}", mlp.mlp_kernel, arguments, integer_mma=bits <= 8, num_warps=warps, trips=trips)


def _after(given: bool) -> dict[str, Any]:
    pointer = "*fp32" if given else None
    return {"after_weight_ptr": pointer, "after_bias_ptr": pointer, "after_eps": "fp32"}


def _window_cases() -> Iterator[Case]:
    yield _window_case("swinir-light w4", 4)
    yield _window_case("swinir-light w4 regions", 4, regions=True)
    yield _window_case("swinir-light w8", 8)
    yield _window_case("swinir-light w8 regions", 8, regions=True)
    yield _window_case("swinir-light bf16 weights", 16)
    yield _window_case("swinir-light bf16 weights regions", 16, regions=True)
    yield _window_case("swinir-light paper w4 regions", 4, regions=True, paper=True)
    yield _window_case("swinir-light paper relative w4", 4, paper=True, RELATIVE=True)
    yield _window_case("swin2sr-light cosine w8 regions", 8, regions=True, norm=False, after=True, SCORES="cosine")


def _window_case(
    name: str,
    bits: int,
    regions: bool = False,
    paper: bool = False,
    norm: bool = True,
    after: bool = False,
    **changes: Any,
) -> Case:
    arguments = {
        "x_ptr": "*bf16", **_attention_arguments(60, 64, regions, paper), "eps": "fp32", "C": 60, "NORM": norm,
        "residual_ptr": "*bf16", "OUT": 60, **_after(after), **_linear(60, bits, "1"), **_linear(6 * 32, bits, "2"),
        **window_attention.tile(60),
    }  # fmt: skip
    kernel = window_attention.window_kernel
    return Case(f"window / {name}", kernel, arguments | changes, integer_mma=bits <= 8, trips=6)


def _attention_cases() -> Iterator[Case]:
    yield _attention_case("swinir-classical 8x8", 180, 64, 64, regions=True)
    yield _attention_case("hat-s 16x16", 144, 256, 256, regions=True)
    yield _attention_case("hat-s 16x16 paper", 144, 256, 256, regions=True, paper=True)
    yield _attention_case("hat-s overlapping", 144, 256, 576, out_bits=0)
    yield _attention_case("hat-s overlapping paper", 144, 256, 576, paper=True, out_bits=0, SCORES="products")
    yield _attention_case("drct 2 heads of 122", 244, 256, 256, heads=2, regions=True)
    yield _attention_case("drct 2 heads of 122 paper", 244, 256, 256, heads=2, regions=True, paper=True)
    yield _attention_case("dat-light 8x32", 60, 256, 256, out_bits=0, regions=True)
    yield _attention_case("dat-light 8x32 paper relative", 60, 256, 256, paper=True, out_bits=0, RELATIVE=True)


def _attention_case(
    name: str,
    channels: int,
    tokens: int,
    keys: int,
    regions: bool = False,
    paper: bool = False,
    out_bits: int = 8,
    heads: int = 6,
    **changes: Any,
) -> Case:
    head_dim = channels // heads
    projection = "*fp32" if out_bits else None
    arguments = _attention_arguments(channels, tokens, regions, paper, heads) | {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp32" if paper else "*bf16"), "key_index_ptr": "*i32",
        "key_regions_ptr": "*u8" if regions else None, "reciprocal_ptr": projection, "offset_ptr": projection,
        "out_ptr": "*u8" if out_bits else "*bf16", "OUT_BITS": out_bits, "key_length": "i32", "KEYS": keys,
        "Q_STRIDE": 3 * channels, "Q_HEAD": head_dim, "K_STRIDE": 3 * channels, "K_HEAD": head_dim,
        "BLOCK_M": attention.BLOCK, "BLOCK_N": attention.BLOCK,
    }  # fmt: skip
    warps, trips = attention.warps(arguments["PADDED"]), blocks(keys, attention.BLOCK)
    return Case(
        f"attention / {name}", attention.attention_kernel, arguments | changes, integer_mma=False, num_warps=warps,
        trips=trips,
    )  # fmt: skip


def _attention_arguments(channels: int, tokens: int, regions: bool, paper: bool, heads: int = 6) -> dict[str, Any]:
    """Arguments that `window_kernel` and `attention_kernel` have in common."""
    quantizers = "*fp32" if paper else None
    return {
        "index_ptr": "*i32", "regions_ptr": "*u8" if regions else None, "score_scale_ptr": "*fp32",
        "bias_ptr": "*fp32", "factors_ptr": quantizers, "bounds_ptr": quantizers, "out_ptr": "*bf16",
        "windows": "i32", "length": "i32", "TOKENS": tokens, "HEADS": heads, "HEAD_DIM": channels // heads,
        "PADDED": power_of_two(channels // heads, 16), "LEFT_BITS": 8 if paper else 0, "RIGHT_BITS": 8 if paper else 0,
        "RELATIVE": False, "SCORES": "scaled", "APART": -100, "DTYPE": tl.float16 if paper else tl.bfloat16,
    }  # fmt: skip


def _channel_cases() -> Iterator[Case]:
    yield from _channel_case("dat-light", 6, 10, False)
    yield from _channel_case("restormer paper relative", 4, 48, True)


def _channel_case(name: str, heads: int, width: int, paper: bool) -> Iterator[Case]:
    padded, bits, codes = power_of_two(width, 16), 8 if paper else 0, "*fp32" if paper else None
    block = channel_attention.token_block(padded)
    shared = {"bounds_ptr": codes, "length": "i32", "WIDTH": width, "PADDED": padded}
    contraction = {"DTYPE": tl.float16 if paper else tl.bfloat16, "PRECISION": "ieee", "BLOCK_T": block}
    parts, part = channel_attention.split(256 * 256)
    eps = {"q_eps": "fp32", "k_eps": "fp32"}
    sums = {
        "q_ptr": "*bf16", "k_ptr": "*bf16", "squares_ptr": codes, "out_ptr": "*i32" if paper else "*fp32",
        "part_length": "i32", "parts": "i32", "Q_STRIDE": 3 * heads * width, "K_STRIDE": 3 * heads * width,
        "GRAM": True, "LEFT_BITS": bits, "RIGHT_BITS": bits, **shared, **contraction, **eps,
    }  # fmt: skip
    maps = {
        "sums_ptr": sums["out_ptr"], "factor_ptr": "*fp32", "out_ptr": "*fp16" if paper else "*bf16", "parts": "i32",
        "heads": heads, "BITS": bits, "RELATIVE": paper,
        "BLOCK_S": channel_attention.part_block(padded), **shared, **eps,
    }  # fmt: skip
    product = {
        "v_ptr": "*bf16", "maps_ptr": maps["out_ptr"], "out_ptr": "*bf16", "V_STRIDE": 3 * heads * width,
        "OUT": heads * width, "BITS": bits, "RELATIVE": paper, **shared, **contraction,
    }  # fmt: skip
    options: dict[str, Any] = {"integer_mma": False, "num_warps": channel_attention.warps(padded)}
    kernel, trips = channel_attention.sums_kernel, blocks(part, block)
    yield Case(f"channel sums / {name}", kernel, sums, num_stages=2, trips=trips, **options)
    trips = blocks(parts, maps["BLOCK_S"])
    yield Case(f"channel maps / {name}", channel_attention.maps_kernel, maps, trips=trips, **options)
    yield Case(f"channel product / {name}", channel_attention.product_kernel, product, **options)


def _convolution_cases() -> Iterator[Case]:
    for name, channels, outputs in (("60 to 60", 60, 60), ("180 to 180", 180, 180), ("3 to 60", 3, 60)):
        sizes = convolution.tile(channels, outputs)
        arguments = {
            "x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*fp32", "residual_ptr": "*bf16", "out_ptr": "*bf16",
            "pixels": "i32", "height": "i32", "width": "i32", "C": channels, "X_ROW": channels,
            "OUT": outputs, "KERNEL_H": 3, "KERNEL_W": 3, "PRECISION": "ieee", "KIND": -1, "SLOPE": 0.0, **sizes,
        }  # fmt: skip
        kernel, trips = convolution.convolution_kernel, 9 * sizes["STEPS"]
        yield Case(f"convolution / {name}", kernel, arguments, integer_mma=False, num_stages=3, trips=trips)


def _rowwise_cases() -> Iterator[Case]:
    chain = Chain(numbers=[1e-5], columns=[180, 180])
    total = chain.emit(Op.BINARY, 180, Binary.ADD, *(chain.emit(Op.LOAD, 180, number, 0, 0) for number in range(2)))
    chain.emit(Op.STORE, 180, total, 0, 0)
    chain.emit(Op.STORE, 180, chain.emit(Op.NORM, 180, total, 0, 1, 1), 1, 0)
    yield _rowwise_case("sum of 180 and its norm", chain, [180, 180], 2)
    chain = Chain(numbers=[0.0], columns=[60])
    kept = chain.emit(Op.UNARY, 60, Unary.GELU, chain.emit(Op.LOAD, 60, 0, 0, 0), 1)
    gate = chain.emit(Op.UNARY, 60, Unary.GELU, chain.emit(Op.LOAD, 60, 1, 60, 0), 1)
    chain.emit(Op.STORE, 60, chain.emit(Op.BINARY, 60, Binary.MUL, kept, gate), 0, 0)
    yield _rowwise_case("halves of 120, GELU, gate", chain, [120, 120], 0)
    chain = Chain(numbers=[0.0], columns=[144])
    gate = chain.emit(Op.UNARY, 144, Unary.SIGMOID, chain.emit(Op.LOAD, 144, 1, 0, 1), 1)
    gated = chain.emit(Op.BINARY, 144, Binary.MUL, chain.emit(Op.LOAD, 144, 0, 0, 0), gate)
    chain.emit(Op.STORE, 144, chain.emit(Op.AFFINE, 144, gated, 0, 1), 0, 0)
    yield _rowwise_case("gate of an image on 144, affine", chain, [144, 144], 2)
    chain = Chain(numbers=[0.0], columns=[144])
    narrow = chain.emit(Op.PRODUCT, 6, chain.emit(Op.LOAD, 144, 0, 0, 0), 0, 1, 144)
    wide = chain.emit(Op.PRODUCT, 144, chain.emit(Op.UNARY, 6, Unary.RELU, narrow, 1), 2, 3, 6)
    chain.emit(Op.STORE, 144, chain.emit(Op.UNARY, 144, Unary.SIGMOID, wide, 1), 0, 0)
    yield _rowwise_case("144 to 6 and back", chain, [144], 4)


def _rowwise_case(name: str, chain: Chain, strides: list[int], constants: int) -> Case:
    arguments = {
        "inputs": ("*bf16",) * len(strides), "outputs": ("*bf16",) * len(chain.columns),
        "constants": ("*fp32",) * constants, "rows": "i32", "rows_per_image": "i32",
        **rowwise.program(chain.code, chain.numbers, strides, chain.columns), "BLOCK_M": rowwise.tile(chain.code),
    }  # fmt: skip
    return Case(f"rowwise / {name}", rowwise.rowwise_kernel, arguments, integer_mma=False)


CASES: tuple[Case, ...] = (
    *_linear_cases(),
    *_mlp_cases(),
    *_window_cases(),
    *_attention_cases(),
    *_channel_cases(),
    *_convolution_cases(),
    *_rowwise_cases(),
)


__all__ = ["CASES", "Case"]
