"""Convolutions of tokens as they lie in memory, channels last, with what follows: ``f(conv(x) + bias) + residual``.

Torch's own adds bias and residual in passes of their own, and writes 16 bits where pixels need more. Here a program
takes a block of pixels and outputs, and sums the products of all taps and channels in float32. Plain torch:
:func:`reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from harmoq_ao.common import elementwise
from harmoq_ao.common.elementwise import Unary
from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels.device import unary
from harmoq_ao.triton_kernels.launch import (
    FLOATS,
    blocks,
    check_matrix,
    check_residual,
    check_vector,
    on_device,
    power_of_two,
    precision,
)

BLOCK_M = 64
"""Pixels of a program."""


@triton.jit
def convolution_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    pixels: int,
    height: int,
    width: int,
    C: tl.constexpr,
    X_ROW: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """`BLOCK_M` pixels and `BLOCK_O` outputs; what lies outside of an image is zero."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    column, line = rows % width, rows // width % height
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    # One loop over taps and blocks of channels: what it loads ahead is one block of each operand.
    for step in range(KERNEL_H * KERNEL_W * STEPS):
        tap, channels = step // STEPS, step % STEPS * BLOCK_C + tl.arange(0, BLOCK_C)
        down, right = tap // KERNEL_W - KERNEL_H // 2, tap % KERNEL_W - KERNEL_W // 2
        inside = (line + down >= 0) & (line + down < height) & (column + right >= 0) & (column + right < width)
        inside &= rows < pixels
        source = rows + (down * width + right)
        left = tl.load(
            x_ptr + source[:, None] * X_ROW + channels[None, :],
            mask=inside[:, None] & (channels < C)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + (tap * C + channels)[:, None] * OUT + outputs[None, :],
            mask=(channels < C)[:, None] & (outputs < OUT)[None, :],
            other=0.0,
        )
        acc = tl.dot(left, weight, acc, input_precision=PRECISION)
    kept = (rows < pixels)[:, None] & (outputs < OUT)[None, :]
    places = rows[:, None] * OUT + outputs[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outputs, mask=outputs < OUT, other=0.0)[None, :]
    acc = unary(acc, SLOPE, KIND)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + places, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=kept)


def takes(weight: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether the kernel computes a convolution: the size of the image stays, every tap and channel counts once.

    Args:
        weight: `[O, C, h, w]`.
        geometry: Stride, padding, dilation, transposed, output padding, groups.
    """
    stride, padding, dilation, transposed, _, groups = geometry
    sides = tuple(weight.shape[2:])
    ones = all(n == 1 for n in (*stride, *dilation, groups))
    return ones and not transposed and all(n % 2 == 1 and p == n // 2 for n, p in zip(sides, padding, strict=True))


def pack(weight: Tensor) -> Tensor:
    """`[O, C, h, w]` as `[h * w, C, O]`, contiguous."""
    return weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()


def tile(channels: int, outputs: int) -> dict[str, int]:
    """Block sizes of the kernel, and in how many steps it goes through the channels of a tap."""
    block = min(power_of_two(channels, 16), 64)
    steps = blocks(channels, block)
    return {"BLOCK_M": BLOCK_M, "BLOCK_C": block, "STEPS": steps, "BLOCK_O": min(power_of_two(outputs, 16), 64)}


def launch_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    kernel: Sequence[int],
    residual: Tensor | None,
    out_dtype: torch.dtype,
    activation: int = -1,
    slope: float = 0.0,
) -> Tensor:
    """Run `convolution_kernel`; arguments as in :func:`reference`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    _, channels, outputs = weight.shape
    images, height, width = size
    pixels = images * height * width
    check_matrix(x, channels, "The activation", FLOATS)
    check_vector(bias, outputs, "bias")
    check_residual(residual, pixels, outputs)
    if len(x) != pixels or weight.dtype != x.dtype:
        raise KernelError(
            "The image does not fit the convolution",
            found=f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} for weights of {weight.dtype}",
            expected=f"{weight.dtype} [{pixels}, {channels}], channels side by side",
        )
    out = torch.empty(pixels, outputs, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    sizes = tile(channels, outputs)
    with on_device(x):
        convolution_kernel[(blocks(pixels, sizes["BLOCK_M"]), blocks(outputs, sizes["BLOCK_O"]))](
            x, weight, bias, residual, out, pixels, height, width,
            C=channels, X_ROW=x.stride(0), OUT=outputs, KERNEL_H=kernel[0], KERNEL_W=kernel[1],
            PRECISION=precision(x.dtype), KIND=activation, SLOPE=slope, **sizes,
        )  # fmt: skip
    return out


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    kernel: Sequence[int],
    residual: Tensor | None,
    out_dtype: torch.dtype,
    activation: int = -1,
    slope: float = 0.0,
) -> Tensor:
    """A convolution that keeps the size of the image.

    Args:
        x: `[images * H * W, C]` float32, float16 or bfloat16; may be some columns of a matrix.
        weight: From :func:`pack`, in the type of ``x``.
        bias: `[O]` float32, or None.
        size: Images, H and W.
        kernel: Height and width of the kernel.
        residual: `[images * H * W, O]` floats added last, or None.
        out_dtype: Of the result.
        activation: A `common.elementwise.Unary` behind the bias; -1 for none.
        slope: Of a leaky ReLU.

    Returns:
        `[images * H * W, O]`.
    """
    images, height, width = size
    outputs = weight.shape[2]
    image = x.float().reshape(images, height, width, -1).permute(0, 3, 1, 2)
    taps = weight.float().unflatten(0, (kernel[0], kernel[1])).permute(3, 2, 0, 1)
    y = F.conv2d(image, taps, bias, padding=(kernel[0] // 2, kernel[1] // 2))
    y = y.permute(0, 2, 3, 1).reshape(-1, outputs)
    y = y if activation < 0 else elementwise.unary(Unary(activation), y, slope)
    return (y if residual is None else y + residual.float()).to(out_dtype)


@torch.library.custom_op("harmoq::convolution", mutates_args=())
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    kernel: Sequence[int],
    residual: Tensor | None,
    out_dtype: torch.dtype,
    activation: int = -1,
    slope: float = 0.0,
) -> Tensor:
    """:func:`reference` as the operator ``harmoq::convolution``: the kernel on a GPU."""
    run = launch_convolution if x.is_cuda else reference
    return run(x, weight, bias, size, kernel, residual, out_dtype, activation, slope)


@convolution.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Any, size: Any, kernel: Any, residual: Any, out_dtype: torch.dtype, *rest: Any
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2], dtype=out_dtype)


__all__ = ["convolution", "convolution_kernel", "launch_convolution", "pack", "reference", "takes", "tile"]
