"""Everything that a GPU has to show, in one command: are the kernels right, and how fast are whole models with them?

    python -m benchmarks.gpu --output benchmarks/results/gpu.jsonl

First every Triton kernel is compared with its reference on fresh random inputs at odd sizes; integers must be equal.
Then whole models with random weights, in the shapes of SwinIR-light, HAT-S and DAT-light, take turns on the same fresh
random images: float32 and bfloat16 eager, bfloat16 under torch.compile (default, and max-autotune with CUDA graphs),
torchao int8, and ours replayed as CUDA graphs; all but the first are prepared for the size of the image. Ratios are
medians within rounds. A contender that fails is recorded with its error. Shapes that are done are not measured again.

Under ``compute-sanitizer python -m benchmarks.gpu --only kernels`` the first part checks memory accesses.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harmoq_ao as h
from benchmarks.measuring import environment, one_line, paired_ratio, percentiles, read_results, write_results
from benchmarks.peers import Run, bfloat16_run, for_size, swinir_light, torchao_int8
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.quant.integer_reference import Affine, LinearOperands, MatmulOperand, linear_accumulate
from harmoq_ao.quant.packing import pack
from harmoq_ao.runtime.fixed_size import fixed_size
from harmoq_ao.triton_kernels import attention, lowbit_linear, mlp, quantize, window_attention
from harmoq_ao.triton_kernels.attention_operands import MatmulQuantizers, PackedAttention, pack_attention
from harmoq_ao.triton_kernels.operands import from_operands

BITS = (8, 4, 3, 2)
SIZES = ((1, 60, 180), (257, 144, 61), (4097, 90, 30))
WINDOWS = ((3, 64, 60, 6), (5, 49, 90, 3), (2, 256, 144, 6))  # windows, tokens, channels, heads
BASE = "float32 eager"


@dataclass(frozen=True)
class Shape:
    """One whole-model measurement.

    Attributes:
        model: Key of :data:`MODELS`.
        scale: Upscaling factor.
        height: Of the input, in pixels.
        width: Of the input, in pixels.
        batch: Images in one call.
    """

    model: str
    scale: int
    height: int
    width: int
    batch: int = 1

    @property
    def name(self) -> str:
        """Such as ``swinir-light x2 256x256 b1``."""
        return f"{self.model} x{self.scale} {self.height}x{self.width} b{self.batch}"


def hat_s(scale: int) -> nn.Module:
    """HAT-S with random weights."""
    from spandrel.architectures.HAT import HAT

    return HAT(
        upscale=scale, img_size=64, window_size=16, compress_ratio=24, squeeze_factor=24, conv_scale=0.01,
        overlap_ratio=0.5, depths=(6,) * 6, embed_dim=144, num_heads=(6,) * 6, mlp_ratio=2, upsampler="pixelshuffle",
    )  # fmt: skip


def dat_light(scale: int) -> nn.Module:
    """DAT-light with random weights."""
    from spandrel.architectures.DAT import DAT

    return DAT(
        upscale=scale, img_size=64, split_size=[8, 32], depth=[18], embed_dim=60, num_heads=[6], expansion_factor=2,
        resi_connection="3conv", upsampler="pixelshuffledirect",
    )  # fmt: skip


MODELS: dict[str, Callable[[int], nn.Module]] = {"swinir-light": swinir_light, "hat-s": hat_s, "dat-light": dat_light}
SHAPES = [Shape(m, s, 512 // s, 512 // s, b) for m in MODELS for s in (2, 4) for b in (1, 8)]
SHAPES += [Shape(m, s, 720 // s, 1280 // s) for m in MODELS for s in (2, 4)]
SHAPES += [Shape("swinir-light", 2, side, side) for side in (64, 128, 512, 1024, 2048)]


# --- kernels ----------------------------------------------------------------------------------------------------------


def check_kernels(device: torch.device) -> list[dict[str, Any]]:
    """Compare kernels with references; ``wrong`` counts integers that differ, ``error`` is the largest of floats."""
    return [row for seed, bits in enumerate(BITS) for row in _check_bits(device, bits, seed)]


def _check_bits(device: torch.device, bits: int, seed: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    for rows, columns, outputs in SIZES:
        first, second = (_random_linear(generator, *s, bits, device) for s in ((outputs, columns), (columns, outputs)))
        x = torch.randn(rows, columns, generator=generator).to(device)
        shape = f"{rows}x{columns}x{outputs}, {bits} bits"
        packed = [from_operands(operands, codes, bits) for operands, codes in (first, second)]
        reciprocal, offset = packed[0].reciprocal, packed[0].offset
        assert reciprocal is not None
        assert offset is not None
        codes = quantize.launch_quantize(x, reciprocal, offset, bits)
        yield _integers(f"quantize {shape}", codes, quantize.reference(x, reciprocal, offset, bits))
        found = lowbit_linear.canonical(lowbit_linear.launch_accumulate(codes, packed[0]), codes, packed[0])
        expected = linear_accumulate(codes.cpu(), first[0].weight.cpu())
        yield _integers(f"lowbit_linear {shape}", found.cpu(), expected)
        floats = lowbit_linear.launch_lowbit_linear(x, packed[0]), lowbit_linear.reference(x, packed[0])
        yield _floats(f"lowbit_linear {shape}", *floats)
        yield _floats(f"mlp {shape}", mlp.launch_mlp(x, *packed), mlp.reference(x, *packed))
    for windows, tokens, channels, heads in WINDOWS:
        for products in ("paper", "relative maps", "deploy"):
            operands = _random_attention(generator, tokens, channels, heads, bits, device, products)
            x = torch.randn(windows, tokens, channels, generator=generator).to(device)
            mask = torch.where(torch.rand(windows, tokens, tokens, generator=generator) < 0.3, -100.0, 0.0).to(device)
            mode = f"{products}, {windows}x{tokens}x{channels}, {heads} heads, {bits} bits"
            found = window_attention.launch_window_attention(x, operands, mask=mask)
            yield _floats(f"window_attention {mode}", found, window_attention.reference(x, operands, mask=mask))
            yield _check_core(operands, x, mask, mode)


def _check_core(whole: PackedAttention, x: Tensor, mask: Tensor, mode: str) -> dict[str, Any]:
    """Attention of given q, k and v."""
    operands = replace(whole, qkv=None, proj=None, proj_heads=None)
    q, k, v = (x.roll(turn, 0).unflatten(-1, (whole.heads, whole.head_dim)).contiguous() for turn in range(3))
    found = attention.launch_attention(q, k, v, operands, mask=mask)
    expected = attention.reference(q, k, v, operands, mask=mask)
    return _floats(f"attention {mode}", found, expected)


def _random_linear(
    generator: torch.Generator, rows: int, columns: int, bits: int, device: torch.device
) -> tuple[LinearOperands, Tensor]:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    scale = (torch.rand(rows, generator=generator) + 0.5) / ((1 << bits) * columns**0.5)
    act = Affine(torch.tensor(6.0 / ((1 << bits) - 1)), torch.tensor(-2.9), bits)
    joint, bias = torch.rand(columns, generator=generator) + 0.5, torch.randn(rows, generator=generator)
    shift = torch.full((rows,), 0.5 if bits < 8 else 0.0)
    signed, scale, shift, bias, joint = (t.to(device) for t in (signed, scale, shift, bias, joint))
    bounds = Affine(act.step.to(device), act.lower.to(device), bits)
    return LinearOperands(signed, scale, shift, bias, bits, bounds, joint), pack(codes, bits).to(device)


def _random_attention(
    generator: torch.Generator, tokens: int, channels: int, heads: int, bits: int, device: torch.device, products: str
) -> PackedAttention:
    qkv, proj = (_random_linear(generator, rows, channels, bits, device) for rows in (3 * channels, channels))
    levels = (1 << bits) - 1

    def bounds(lower: float, upper: float) -> MatmulOperand:
        step, low = torch.tensor((upper - lower) / levels), torch.tensor(lower)
        return MatmulOperand(bits, Affine(step.to(device), low.to(device), bits))

    parts = (bounds(-2.0, 2.0), bounds(-3.0, 3.0), bounds(0.0, 1.0), bounds(-3.0, 3.0))
    matmuls = None if products == "deploy" else MatmulQuantizers(*parts, relative=products == "relative maps")
    scale = torch.full((heads,), (channels // heads) ** -0.5, device=device)
    bias = torch.randn(heads, tokens, tokens, generator=generator).to(device)
    linears = (*qkv, bits), (*proj, bits)
    return pack_attention(*linears, heads, channels // heads, scale, bias=bias, matmuls=matmuls)


def _integers(name: str, found: Tensor, expected: Tensor) -> dict[str, Any]:
    return {"check": name, "wrong": int((found != expected).sum()), "of": expected.numel()}


def _floats(name: str, found: Tensor, expected: Tensor) -> dict[str, Any]:
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return {"check": name, "error": float(error)}


# --- whole models -----------------------------------------------------------------------------------------------------


def contenders(model: nn.Module, example: Tensor) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Name of each contender, and what makes it."""
    size = example.shape[-2:]
    bfloat16 = for_size(copy.deepcopy(model).bfloat16(), size)
    yield BASE, lambda: model
    yield "bfloat16 eager", lambda: bfloat16_run(bfloat16)
    yield "bfloat16 compile", lambda: bfloat16_run(torch.compile(bfloat16))
    yield "bfloat16 compile, CUDA graphs", lambda: bfloat16_run(torch.compile(bfloat16, mode="max-autotune"))
    yield "torchao int8 dynamic", lambda: bfloat16_run(torch.compile(torchao_int8(copy.deepcopy(bfloat16))))
    for bits in BITS:
        yield f"W{bits}A{bits}", partial(_ours, model, example, bits)


def _ours(model: nn.Module, example: Tensor, bits: int) -> Run:
    return fixed_size(_quantized(model, example, bits), example)


def _quantized(model: nn.Module, example: Tensor, bits: int) -> QuantizedModel:
    crops = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    prepared = h.prepare_harmoq(copy.deepcopy(model).cpu(), h.HarmoqConfig(bits, bits), [crops[0]])
    quantized = h.convert_harmoq(h.calibrate(prepared, crops, show_progress=False), float_dtype=torch.bfloat16)
    moved: QuantizedModel = quantized.to(example.device)
    return moved


@torch.no_grad()
def measure(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds, ratio to float32 eager and peak memory in MB of every contender for one shape."""
    torch.manual_seed(0)
    model = MODELS[shape.model](shape.scale).eval().to(device)
    size = (shape.batch, 3, shape.height, shape.width)
    example = torch.rand(size, device=device)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in contenders(model, example):
        try:
            runs[name] = make()
            rows[name] = {"peak_mb": _peak(runs[name], example)}
        except Exception as error:  # whatever another library fails with is a result
            rows[name] = {"error": one_line(error)}
            runs.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 3):
        image = torch.rand(size, device=device)
        for name, run in runs.items():
            seconds = _seconds(run, image)
            if index >= 3:
                times[name].append(seconds)
    for name, values in times.items():
        ratio = paired_ratio(times[BASE], values)
        rows[name] |= {**percentiles(values), "speed_vs_float32_eager": round(ratio, 3)}
    return rows


def _seconds(run: Run, image: Tensor) -> float:
    if not image.is_cuda:
        start = time.perf_counter()
        run(image)
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run(image)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def _peak(run: Run, example: Tensor) -> float | None:
    """Memory that a call takes beyond what is there before it."""
    if not example.is_cuda:
        run(example)
        return None
    run(example)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(example)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, write; returns the number of kernels that are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.jsonl"))
    parser.add_argument("--only", choices=("kernels", "models"))
    parser.add_argument("--shapes", nargs="*", help="names of shapes; all by default")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; without one, the kernels run in tests/triton_kernels and the compile gate")
    device = torch.device("cuda")
    about = {"gpu": torch.cuda.get_device_name(), **environment(("triton", "torchao", "spandrel"))}
    known, rows = read_results(options.output)
    rows = [row for row in rows if "shape" in row] if known.get("gpu") == about["gpu"] else []
    done = {row["shape"] for row in rows}
    checks = [] if options.only == "models" else check_kernels(device)
    print(*checks, sep="\n")
    write_results(options.output, about, [*checks, *rows])
    for shape in [s for s in SHAPES if options.only != "kernels" and s.name not in done]:
        if options.shapes and shape.name not in options.shapes:
            continue
        found = measure(shape, device, options.rounds)
        rows += [{"shape": shape.name, "contender": name, **row} for name, row in found.items()]
        print(*rows[-len(found) :], sep="\n")
        write_results(options.output, about, [*checks, *rows])
    return sum(row.get("wrong", 0) > 0 for row in checks)


if __name__ == "__main__":
    raise SystemExit(main())
