"""Kernels on random operands, each beside its reference: what is checked, and what is timed.

Checks are of odd sizes, in all widths; timings are of the 65,536 tokens of a 512 x 512 output at x2.
Random operands are such that nothing in them is negligible: biases, scales, masks and residuals all show in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.plan import ALL_BITS
from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.quant.integer_reference import Affine, LinearOperands, MatmulOperand, linear_accumulate
from harmoq_ao.quant.packing import pack
from harmoq_ao.triton_kernels import (
    attention,
    attention_operands,
    channel_attention,
    convolution,
    lowbit_linear,
    mlp,
    window_attention,
)
from harmoq_ao.triton_kernels.attention_operands import (
    FUSED_HEAD_DIM,
    MatmulQuantizers,
    PackedAttention,
    pack_attention,
)
from harmoq_ao.triton_kernels.channel_attention import PackedChannels, pack_channels
from harmoq_ao.triton_kernels.operands import Norm, from_operands, with_norm
from harmoq_ao.triton_kernels.rowwise import Chain, Op, launch_rowwise
from harmoq_ao.triton_kernels.rowwise import reference as reference_rowwise

TOLERANCE = 1e-2
"""Largest root mean square of errors, in those of the result: bfloat16 rounds to 2**-9."""

FAR = 0.1
"""An element is wrong, not rounded, if it is off by more than this share of the largest."""

FLIPPED = 1e-3
"""Share of elements that may be far off: an activation at a tie takes the next code, and at 2 bits that is much."""

_EPS = 1e-5
_HALF = torch.bfloat16
_T = TypeVar("_T")
Grid = tuple[int, int, int, int]
"""Windows down and across an image, height and width of a window."""


@dataclass(frozen=True)
class Call:
    """A kernel and its reference on the same operands.

    Attributes:
        run: Launches the kernel.
        reference: Computes the same in plain torch.
        bytes: Least traffic: activations read and written once, weights read once.
        int8: Integer multiply-adds of the operation.
        float16: Floating-point ones.
    """

    run: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    bytes: int = 0
    int8: int = 0
    float16: int = 0


@dataclass(frozen=True)
class Problem:
    """A kernel with operands to be made.

    Attributes:
        name: Unique.
        make: Puts operands on a device.
        exact: The results are integers, to be equal.
    """

    name: str
    make: Callable[[torch.device], Call]
    exact: bool = False


def compare(found: Tensor, expected: Tensor, exact: bool) -> dict[str, Any]:
    """A row: whether the result is right, and by how much it is not.

    Integers have to be equal. Floats have to be finite, of small error on the whole (:data:`TOLERANCE`) and nearly
    everywhere (:data:`FAR`, :data:`FLIPPED`).
    """
    if found.shape != expected.shape:
        return {"ok": False, "error": f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"}
    if exact:
        wrong = int((found.cpu() != expected.cpu()).sum())
        return {"ok": wrong == 0, "wrong": wrong, "of": expected.numel()}
    found, expected = found.double().cpu(), expected.double().cpu()
    infinite = int((~found.isfinite()).sum())
    if infinite:
        return {"ok": False, "not_finite": infinite, "of": expected.numel()}
    difference = (found - expected).abs()
    error = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
    worst = float(difference.max() / expected.abs().max())
    far = float((difference > FAR * expected.abs().max()).double().mean())
    ok = error <= TOLERANCE and far <= FLIPPED  # false for NaN, too
    return {"ok": ok, "error_rms": error, "error_max": worst, "far": far}


def checks(tiny: bool) -> dict[str, Problem]:
    """What is compared with its reference, by name.

    Args:
        tiny: Sizes for Triton's interpreter.
    """
    return {problem.name: problem for problem in _checks(tiny)}


def timings(tiny: bool) -> dict[str, Problem]:
    """What is timed, by name; arguments as :func:`checks`."""
    return {problem.name: problem for problem in _timings(tiny)}


def sanitized(tiny: bool) -> list[str]:
    """Names of the checks that run under compute-sanitizer: one of each kernel and form."""
    found: dict[str, str] = {}
    for name in checks(tiny):
        found.setdefault(name.partition(":")[0], name)
    return list(found.values())


# --- the lists --------------------------------------------------------------------------------------------------------


def _checks(tiny: bool) -> Iterator[Problem]:
    sizes = [(5, 12, 24)] if tiny else [(257, 144, 61), (4097, 60, 180), (1, 180, 180)]
    forms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {}),
        (", norm, gelu", {"eps": _EPS, "gelu": "erf"}),
        (", gate, residual", {"gate": True, "residual": True}),
    )
    for rows, columns, outputs in sizes:
        for bits in (4,) if tiny else ALL_BITS:
            size = f"{rows}x{columns}x{outputs} w{bits}"
            linear = partial(_Linear, rows, columns, outputs, bits)
            yield Problem(f"accumulate: {size}", _then(linear, _Linear.accumulate), exact=True)
            for form, options in forms:
                yield Problem(f"linear{form}: {size}", _then(linear, _Linear.linear, dtype=_HALF, **options))
    sizes = [(5, 12, 24)] if tiny else [(4097, 60, 120), (257, 144, 288), (1023, 180, 360)]
    for rows, channels, hidden in sizes:
        for bits in (4,) if tiny else ALL_BITS:
            size = f"{rows}x{channels}x{hidden} w{bits}"
            yield Problem(f"mlp, norm, residual: {size}", partial(_mlp, rows, channels, hidden, bits))
        size = f"{rows}x{channels}x{hidden} w4"
        yield Problem(f"mlp, norm after: {size}", partial(_mlp, rows, channels, hidden, 4, after=True))
        yield Problem(f"mlp, float32: {size}", partial(_mlp, rows, channels, hidden, 4, dtype=torch.float32))
    yield from _attention_checks(tiny)
    yield from _channel_checks(tiny)
    yield from _float_checks(tiny)


def _attention_checks(tiny: bool) -> Iterator[Problem]:
    sizes: list[tuple[Grid, int, int]] = [
        ((3, 2, 8, 8), 60, 6), ((1, 3, 7, 7), 90, 3), ((2, 2, 8, 8), 180, 6), ((2, 2, 16, 16), 144, 6),
        ((2, 1, 8, 32), 60, 3), ((1, 2, 16, 16), 244, 2),
    ]  # fmt: skip
    if tiny:
        sizes = [((1, 2, 3, 3), 12, 2)]
    forms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("deploy, shifted, norm, residual", {"shifted": True, "norm": True}),
        ("deploy", {}),
        ("paper, shifted", {"shifted": True, "products": "paper"}),
        ("relative maps", {"products": "relative"}),
    )
    for grid, channels, heads in sizes:
        name = f"{'x'.join(map(str, grid))}x{channels}"
        for form, options in forms:
            for bits in (4,) if tiny else ALL_BITS if "norm" in form else (4,):
                windows = partial(_Windows, 2, grid, channels, heads, bits, **options)
                if channels // heads <= FUSED_HEAD_DIM:
                    yield Problem(f"window {form}: {name} w{bits}", _then(windows, _Windows.whole))
                if "norm" not in form:
                    yield Problem(f"attention {form}: {name} w{bits}", _then(windows, _Windows.core))
        overlapping = partial(_Windows, 2, grid, channels, heads, 4)
        if grid[2] * grid[3] <= 64:
            yield Problem(f"attention overlapping: {name}", _then(overlapping, _Windows.overlapping))


def _channel_checks(tiny: bool) -> Iterator[Problem]:
    for heads, width in [(2, 6)] if tiny else [(6, 10), (4, 48)]:
        rows, name = 40 if tiny else 5001, f"channel attention: {heads}x{width}"
        for form in ("paper relative", "paper", "deploy"):
            relative = form == "paper relative"
            yield Problem(
                f"{name} {form}", partial(_channels, 2, rows, heads, width, form != "deploy", relative=relative)
            )
        yield Problem(f"{name} sums of codes", partial(_channel_sums, 2, rows, heads, width), exact=True)


def _float_checks(tiny: bool) -> Iterator[Problem]:
    """What stays float between contractions."""
    for channels, outputs, kernel in [(12, 12, 3)] if tiny else [(60, 60, 3), (180, 60, 1), (60, 12, 3), (144, 144, 3)]:
        for dtype in (_HALF, torch.float32):
            name = f"{channels}x{outputs} {kernel}x{kernel} {str(dtype).partition('.')[2]}"
            size = (2, 5, 7) if tiny else (2, 37, 53)
            yield Problem(f"convolution: {name}", partial(_convolution, size, channels, outputs, kernel, dtype))
    for channels in (12,) if tiny else (60, 180):
        yield Problem(f"rowwise: {channels}", partial(_rowwise, 2, 17 if tiny else 1999, channels))


def _timings(tiny: bool) -> Iterator[Problem]:
    models: list[tuple[str, Grid, int, int]] = [
        ("swinir-light", (32, 32, 8, 8), 60, 6), ("hat-s", (16, 16, 16, 16), 144, 6),
        ("swinir", (32, 32, 8, 8), 180, 6), ("dat-light", (32, 8, 8, 32), 60, 3),
    ]  # fmt: skip
    if tiny:
        models = [("tiny", (1, 2, 3, 3), 12, 2)]
    for model, grid, channels, heads in models:
        tokens = math.prod(grid)
        for bits in (8, 4) if "light" in model else (8,):
            linear = partial(_Linear, tokens, channels, 3 * channels, bits)
            windows = partial(_Windows, 1, grid, channels, heads, bits, norm=True)
            yield Problem(f"linear: {model} qkv w{bits}", _then(linear, _Linear.linear, dtype=_HALF))
            yield Problem(f"mlp, norm, residual: {model} w{bits}", partial(_mlp, tokens, channels, 2 * channels, bits))
            yield Problem(f"window, norm, residual: {model} w{bits}", _then(windows, _Windows.whole))
            yield Problem(
                f"window, shifted, norm, residual: {model} w{bits}", _then(windows, _Windows.whole, shifted=True)
            )
        yield Problem(f"attention: {model}", _then(windows, _Windows.core))
        image = (1, grid[0] * grid[2], grid[1] * grid[3])
        yield Problem(f"convolution: {model} 3x3", partial(_convolution, image, channels, channels, 3, _HALF))
        if model not in ("hat-s", "swinir"):
            yield Problem(f"rowwise: {model}", partial(_rowwise, 1, tokens, channels))
    heads, width = (2, 6) if tiny else (6, 10)
    name = f"channel attention: {'tiny' if tiny else 'dat-light'}"
    yield Problem(name, partial(_channels, 1, 18 if tiny else 256 * 256, heads, width, False))


# --- operands ---------------------------------------------------------------------------------------------------------


class _Linear:
    """A linear and activations that it quantizes."""

    def __init__(
        self, rows: int, columns: int, outputs: int, bits: int, device: torch.device,
        *, dtype: torch.dtype = torch.float32, gate: bool = False, residual: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(rows + bits)
        self.operands, codes = _random_linear(generator, outputs, columns, bits, device)
        self.packed = from_operands(self.operands, codes, bits)
        self.x = torch.randn(rows, columns, generator=generator).to(device, dtype)
        if gate:
            options["gate"] = torch.randn(rows, columns, generator=generator).to(device, dtype)
        if residual:
            options["residual"] = torch.randn(rows, outputs, generator=generator).to(device, dtype)
        self.options = options

    def accumulate(self) -> Call:
        bits, generator = self.operands.act_bits, torch.Generator().manual_seed(1)
        codes = torch.randint(0, 1 << bits, self.x.shape, generator=generator, dtype=torch.uint8).to(self.x.device)

        def run() -> Tensor:
            return lowbit_linear.canonical(lowbit_linear.launch_accumulate(codes, self.packed), codes, self.packed)

        return Call(run, lambda: linear_accumulate(codes.cpu(), self.operands.weight.cpu()))

    def linear(self) -> Call:
        rows, columns, outputs = len(self.x), self.packed.columns, self.packed.rows
        kernel, reference = lowbit_linear.launch_lowbit_linear, lowbit_linear.reference
        return replace(
            _beside(kernel, reference, self.x, self.packed, out_dtype=self.x.dtype, **self.options),
            bytes=self.x.element_size() * rows * (columns + outputs) + columns * outputs,
            int8=rows * columns * outputs,
        )


def _mlp(
    rows: int, channels: int, hidden: int, bits: int, device: torch.device,
    *, dtype: torch.dtype = _HALF, after: bool = False,
) -> Call:  # fmt: skip
    """An MLP with its residual, and its LayerNorm in front or behind."""
    generator = torch.Generator().manual_seed(rows + bits)
    sizes = ((hidden, channels), (channels, hidden))
    fc1, fc2 = (from_operands(*_random_linear(generator, *size, bits, device), bits) for size in sizes)
    weight, bias = _affine_of_norm(generator, channels, device)
    x = torch.randn(rows, channels, generator=generator).to(device, dtype)
    if after:
        options: dict[str, Any] = {"after": Norm(weight, bias, _EPS), "residual": x}
    else:
        fc1, options = with_norm(fc1, weight, bias), {"eps": _EPS, "residual": x}
    return replace(
        _beside(mlp.launch_mlp, mlp.reference, x, fc1, fc2, **options),
        bytes=2 * x.element_size() * x.numel() + 2 * channels * hidden,
        int8=2 * rows * channels * hidden,
    )


class _Windows:
    """Images cut into windows by index, and an attention of their tokens.

    Args:
        images: How many.
        grid: How each is cut.
        channels: Of a token.
        heads: Of the attention.
        bits: Of weights; of activations and products, too, in modes ``paper`` and ``relative``.
        device: For all tensors.
        shifted: Windows are shifted by half of their sides, and regions do not attend to each other.
        norm: A LayerNorm in front, and the residual.
        products: ``deploy``, ``paper`` or ``relative``.
    """

    def __init__(
        self, images: int, grid: Grid, channels: int, heads: int, bits: int, device: torch.device,
        *, shifted: bool = False, norm: bool = False, products: str = "deploy",
    ) -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(images + bits)
        self.grid, self.device = grid, device
        self.tokens = grid[2] * grid[3]
        self.operands = _random_attention(self.generator, self.tokens, channels, heads, bits, device, products)
        self.x = torch.randn(images, math.prod(grid), channels, generator=self.generator).to(device, _HALF)
        self.windows: dict[str, Any] = {"index": self._cut(_places(grid), shifted).int().to(device)}
        if shifted:
            self.windows["regions"] = self._cut(_regions(grid), False).to(torch.uint8).to(device)
        self.norm: dict[str, Any] = {}
        if norm:
            affine = _affine_of_norm(self.generator, channels, device)
            self.operands = attention_operands.with_norm(self.operands, *affine)
            self.norm = {"eps": _EPS, "residual": self.x}

    def _cut(self, plane: Tensor, shifted: bool) -> Tensor:
        """`[windows, tokens]` of a plane `[height, width]`."""
        down, across, height, width = self.grid
        plane = plane.roll((-(height // 2), -(width // 2)), (0, 1)) if shifted else plane
        return plane.view(down, height, across, width).transpose(1, 2).reshape(down * across, height * width)

    def whole(self) -> Call:
        """From tokens to tokens, qkv and projection included."""
        images, tokens, channels = self.x.shape
        kernel, reference = window_attention.launch_window_attention, window_attention.reference
        return replace(
            _beside(kernel, reference, self.x, self.operands, **self.windows, **self.norm),
            bytes=2 * self.x.element_size() * self.x.numel() + 4 * channels * channels,
            int8=4 * images * tokens * channels * channels,
            float16=2 * images * tokens * self.tokens * channels,
        )

    def core(self) -> Call:
        """Of given q, k and v, which are parts of one matrix."""
        images, tokens, channels = self.x.shape
        return replace(
            _beside(attention.launch_attention, attention.reference, *self._qkv(), self._core(), **self.windows),
            bytes=4 * self.x.element_size() * self.x.numel(),
            float16=2 * images * tokens * self.tokens * channels,
        )

    def overlapping(self) -> Call:
        """As in HAT: keys from a window half as large again, of zeros outside of the image."""
        down, across, height, width = self.grid
        sides, margin = (height + 2 * (height // 4), width + 2 * (width // 4)), (height // 4, width // 4)
        padded = torch.full((down * height + 2 * margin[0], across * width + 2 * margin[1]), -1)
        padded[margin[0] : margin[0] + down * height, margin[1] : margin[1] + across * width] = _places(self.grid)
        keys = padded.unfold(0, sides[0], height).unfold(1, sides[1], width).reshape(down * across, -1)
        operands = self._core()
        bias = torch.randn(operands.heads, self.tokens, keys.shape[1], generator=self.generator).to(self.device)
        operands = pack_attention(
            None, None, operands.heads, operands.head_dim, _scale(operands, self.device), bias=bias
        )
        options = self.windows | {"key_index": keys.int().to(self.device)}
        return _beside(attention.launch_attention, attention.reference, *self._qkv(), operands, **options)

    def _qkv(self) -> list[Tensor]:
        operands = self.operands
        qkv = torch.randn(*self.x.shape[:2], 3, operands.heads, operands.head_dim, generator=self.generator)
        return list(qkv.to(self.device, _HALF).unbind(2))

    def _core(self) -> PackedAttention:
        return replace(self.operands, qkv=None, proj=None, qkv_heads=None, proj_heads=None)


def _channel_operands(
    images: int, rows: int, heads: int, width: int, paper: bool, device: torch.device, relative: bool = False
) -> tuple[list[Tensor], PackedChannels]:
    """q, k and v, parts of one matrix whose columns depend on each other, and an attention among its channels."""
    generator = torch.Generator().manual_seed(heads + width)
    whole = torch.randn(images * rows, 3 * heads * width, generator=generator)
    parts = (whole + whole.roll(1, 1) + 0.5 * whole[:, :1]).to(device, _HALF).chunk(3, 1)
    largest = 6 / math.sqrt(rows)  # of entries of columns of length one
    ranges = ((-largest, largest), (-largest, largest), (0.0, 1.0), (-4.0, 4.0))
    quantizers = [_affine(*bounds, 8, device) for bounds in ranges] if paper else None
    factor = torch.linspace(4.0, 9.0, heads).to(device)
    return list(parts), pack_channels(heads, width, factor, (1e-12, 1e-12), quantizers, relative)


def _channels(
    images: int, rows: int, heads: int, width: int, paper: bool, device: torch.device, relative: bool = False
) -> Call:
    """Attention among channels of images."""
    parts, operands = _channel_operands(images, rows, heads, width, paper, device, relative)
    kernel, reference = channel_attention.launch_channel_attention, channel_attention.reference
    products = 2 * images * rows * heads * width**2
    return replace(
        _beside(kernel, reference, *parts, operands, images),
        bytes=(6 if paper else 4) * parts[0].element_size() * parts[0].numel(),
        float16=products,
    )


def _channel_sums(images: int, rows: int, heads: int, width: int, device: torch.device) -> Call:
    """Sums of products of codes, which lengths that are given make of queries and keys."""
    (q, k, _), o = _channel_operands(images, rows, heads, width, True, device)
    options = (o.bounds, heads, images, o.eps, o.bits)
    squares = channel_attention.reference_sums(q, k, None, *options)
    return _beside(channel_attention.launch_sums, channel_attention.reference_sums, q, k, squares, *options)


def _convolution(
    size: tuple[int, int, int], channels: int, outputs: int, kernel: int, dtype: torch.dtype, device: torch.device
) -> Call:
    """A convolution of images, channels last, with bias and residual."""
    generator = torch.Generator().manual_seed(channels + outputs)
    rows = math.prod(size)
    x = torch.randn(rows, channels, generator=generator).to(device, dtype)
    weight = torch.randn(outputs, channels, kernel, kernel, generator=generator) / math.sqrt(channels * kernel**2)
    bias, residual = torch.randn(outputs, generator=generator), torch.randn(rows, outputs, generator=generator)
    operands = (convolution.pack(weight).to(device, dtype), bias.to(device), size, (kernel, kernel))
    return replace(
        _beside(convolution.launch_convolution, convolution.reference, x, *operands, residual.to(device, dtype), dtype),
        bytes=x.element_size() * rows * (channels + 2 * outputs),
        float16=rows * channels * outputs * kernel**2,
    )


def _rowwise(images: int, rows: int, channels: int, device: torch.device) -> Call:
    """A LayerNorm, GELU, a gate that has one row for each image, and a residual."""
    generator = torch.Generator().manual_seed(channels)
    x, residual = torch.randn(2, images * rows, channels, generator=generator).to(device, _HALF)
    gate = torch.randn(images, channels, generator=generator).to(device, _HALF)
    weight, bias = _affine_of_norm(generator, channels, device)
    chain = Chain(constants=[weight, bias], numbers=[_EPS], columns=[channels], half=[True])
    loaded = [chain.emit(Op.LOAD, channels, place, 0, place == 1) for place in range(3)]
    value = chain.emit(Op.NORM, channels, loaded[0], 0, 1, 1)
    value = chain.emit(Op.UNARY, channels, Unary.GELU, value, 0)
    value = chain.emit(Op.BINARY, channels, Binary.MUL, value, loaded[1])
    value = chain.emit(Op.BINARY, channels, Binary.ADD, value, loaded[2])
    chain.emit(Op.STORE, channels, value, 0, 0)
    inputs = [x, gate, residual]
    operands = (inputs, chain.constants, chain.code, chain.numbers, chain.columns, chain.half, images * rows, rows)
    return Call(
        lambda: launch_rowwise(*operands)[0],
        lambda: reference_rowwise(*operands)[0],
        bytes=3 * x.element_size() * x.numel(),
    )


def _places(grid: Grid) -> Tensor:
    """`[height, width]`, the number of each token of an image."""
    down, across, height, width = grid
    return torch.arange(math.prod(grid)).view(down * height, across * width)


def _regions(grid: Grid) -> Tensor:
    """`[height, width]`, ids of what the shift brings together, in its coordinates."""
    down, across, height, width = grid
    sides = ((down * height, height), (across * width, width))
    first, second = ((torch.arange(n) >= n - w).long() + (torch.arange(n) >= n - w // 2) for n, w in sides)
    return 3 * first[:, None] + second


def _then(make: Callable[..., _T], form: Callable[[_T], Call], **options: Any) -> Callable[[torch.device], Call]:
    """What puts operands on a device and takes one of their calls."""
    return lambda device: form(make(device=device, **options))


def _beside(kernel: Any, reference: Any, *operands: Any, **options: Any) -> Call:
    """Both on the same operands."""
    return Call(partial(kernel, *operands, **options), partial(reference, *operands, **options))


def _affine_of_norm(generator: torch.Generator, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, channels, generator=generator).to(device) / 4
    return 1 + weight, bias.contiguous()


def _scale(operands: PackedAttention, device: torch.device) -> Tensor:
    return torch.full((operands.heads,), operands.head_dim**-0.5, device=device)


def _random_linear(
    generator: torch.Generator, rows: int, columns: int, bits: int, device: torch.device, act_bits: int | None = None
) -> tuple[LinearOperands, Tensor]:
    """Operands of a linear with static bounds, and its packed codes."""
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    scale = (torch.rand(rows, generator=generator) + 0.5) * 2 / ((1 << bits) * math.sqrt(columns))
    joint, bias = torch.rand(columns, generator=generator) + 0.5, torch.randn(rows, generator=generator)
    shift = torch.full((rows,), 0.5 if bits < 8 else 0.0)
    signed, scale, shift, bias, joint = (t.to(device) for t in (signed, scale, shift, bias, joint))
    act = _affine(-2.9, 3.1, act_bits or bits, device)
    return LinearOperands(signed, scale, shift, bias, act.bits, act, joint), pack(codes, bits).to(device)


def _random_attention(
    generator: torch.Generator, tokens: int, channels: int, heads: int, bits: int, device: torch.device, products: str
) -> PackedAttention:
    # Where floats are rounded to bfloat16 in between, more than a few would take another code of few bits.
    act_bits = 8 if products == "deploy" else bits
    qkv, proj = (
        (*_random_linear(generator, rows, channels, bits, device, act_bits), bits) for rows in (3 * channels, channels)
    )
    ranges = ((-2.0, 2.0), (-3.0, 3.0), (0.0, 1.0), (-3.0, 3.0))
    q, k, weights, v = (MatmulOperand(bits, _affine(*bounds, bits, device)) for bounds in ranges)
    matmuls = None if products == "deploy" else MatmulQuantizers(q, k, weights, v, products == "relative")
    scale = torch.full((heads,), (channels // heads) ** -0.5, device=device)
    bias = torch.randn(heads, tokens, tokens, generator=generator).to(device)
    return pack_attention(qkv, proj, heads, channels // heads, scale, bias=bias, matmuls=matmuls)


def _affine(lower: float, upper: float, bits: int, device: torch.device) -> Affine:
    step = torch.tensor((upper - lower) / ((1 << bits) - 1), device=device)
    return Affine(step, torch.tensor(lower, device=device), bits)


def floor(row: dict[str, Any], rates: dict[str, Any]) -> dict[str, Any]:
    """What a timed kernel cannot be faster than on this device, in ms, and how much of that speed it reaches.

    The longest of: bytes at the speed of a copy, multiply-adds at the speed of a large product of matrices.

    Args:
        row: Of a timing: `bytes`, `int8_macs`, `float16_macs`, `p50_ms`.
        rates: The row of ``time/device``; without it there is no floor.
    """
    names = {"bytes": "copied_bytes_per_s", "int8_macs": "int8_macs_per_s", "float16_macs": "bfloat16_macs_per_s"}
    if "p50_ms" not in row or not all(name in rates for name in names.values()):
        return {}
    longest = max(1000 * row[work] / rates[rate] for work, rate in names.items())
    return {"floor_ms": longest, "of_floor": longest / row["p50_ms"]}
