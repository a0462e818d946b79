"""Is the int8 linear faster than float on this CPU, quantization of its input included?

Times, in one process and interleaved, `onednn.linear` (static qparams, static with a joint scale, 8-bit mid-rise
weights, qparams per token) against ``F.linear`` in float32 and bfloat16, at the shapes of SwinIR-light and DAT-light,
on fresh random inputs in every round; then products of two quantized activations. Reports p20/p50/p80 in ms and
the ratio of medians to float32 (above 1: faster than float32).

    python -m benchmarks.cpu_linear --threads 2 --output benchmarks/results/cpu_linear.jsonl

Page faults of large outputs have nothing to do with the kernels, so freed memory is kept, for every contender alike.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F

from benchmarks.measuring import environment, write_results
from harmoq_ao.kernels import float_matmul, onednn
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, LinearOperands, MatmulOperand

SHAPES = [(m, k, n) for m in (65536, 16384) for k, n in ((60, 180), (60, 120), (120, 60), (60, 60))]
MATMULS = {
    "attention scores [1536, 64, 10] x [1536, 10, 64]": ((1536, 64, 10), (1536, 10, 64)),
    "attention output [1536, 64, 64] x [1536, 64, 10]": ((1536, 64, 64), (1536, 64, 10)),
    "channel attention [6, 10, 65536] x [6, 65536, 10]": ((6, 10, 65536), (6, 65536, 10)),
}


def measure(
    shape: str, contenders: dict[str, Callable[[], object]], rounds: int, refresh: Callable[[], None]
) -> pd.DataFrame:
    """Quantiles in milliseconds, one row for each contender; ratios are of medians to the first contender's.

    One call each per round, ``refresh`` (new inputs) before each round. The order rotates from round to round: what
    runs after a neighbour that read the same input finds it in the cache.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds + 2):
        refresh()
        order.append(order.pop(0))
        for name in order:
            start = time.perf_counter()
            contenders[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    quantiles = pd.DataFrame(times).iloc[2:].quantile([0.2, 0.5, 0.8])  # the first two warm up
    rows = quantiles.T.set_axis(["p20", "p50", "p80"], axis=1).rename_axis("contender").reset_index()
    rows.insert(0, "shape", shape)
    rows["ratio"] = rows["p50"].iloc[0] / rows["p50"]
    return rows


def operands(k: int, n: int, shift: float = 0.0, dynamic: bool = False, joint: bool = False) -> LinearOperands:
    """Random 8-bit operands; ``shift`` 0.5 is the mid-rise grid."""
    return LinearOperands(
        weight=torch.randint(-128, 128, (n, k), dtype=torch.int8),
        weight_scale=torch.rand(n) * 0.01 + 0.001,
        weight_shift=torch.full((n,), shift),
        bias=torch.randn(n),
        act_bits=8,
        act=None if dynamic else Affine(torch.tensor(8 / 255), torch.tensor(-4.0), 8),
        joint_scale=torch.rand(k) + 0.5 if joint else None,
    )


def bench_linear(m: int, k: int, n: int, rounds: int) -> pd.DataFrame:
    """All linears at ``[m, k] x [k, n]``."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    narrow, narrow_weight, narrow_bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    contenders: dict[str, Callable[[], object]] = {
        "float32": lambda: F.linear(x, weight, bias),
        "bfloat16": lambda: F.linear(narrow, narrow_weight, narrow_bias),
    }
    kinds = {
        "int8 static": operands(k, n),
        "int8 static, joint scale": operands(k, n, joint=True),
        "int8 static, mid-rise weights": operands(k, n, shift=0.5),
        "int8 per token": operands(k, n, dynamic=True),
        "int8 per token, joint scale": operands(k, n, dynamic=True, joint=True),
    }
    for name, kind in kinds.items():
        packed = onednn.pack_linear(kind)
        contenders[name] = partial(onednn.linear, x, packed)
        if name == "int8 static":
            contenders["int8 static, bfloat16 in and out"] = partial(onednn.linear, narrow, packed)
            contenders["  its quantization alone"] = partial(onednn.quantize, x, packed)

    def refresh() -> None:
        x.normal_()
        narrow.copy_(x)

    return measure(f"{m}x{k}x{n}", contenders, rounds, refresh)


def bench_matmul(name: str, left: tuple[int, ...], right: tuple[int, ...], rounds: int) -> pd.DataFrame:
    """Float32 matmul, and quantized matmul from float operands."""
    a, b = torch.empty(left), torch.empty(right)
    static, per_token = MatmulOperand(8, Affine(torch.tensor(8 / 255), torch.tensor(-4.0), 8)), MatmulOperand(8)

    def refresh() -> None:
        a.normal_()
        b.normal_()

    contenders: dict[str, Callable[[], object]] = {
        "float32": lambda: a @ b,
        "quantized, static": lambda: float_matmul.quantized_matmul(a, b, static, static),
        "quantized, per token": lambda: float_matmul.quantized_matmul(a, b, per_token, per_token),
        "quantized, per token, reference": lambda: integer_reference.quantized_matmul(a, b, per_token, per_token),
    }
    return measure(name, contenders, rounds, refresh)


def main() -> None:
    """Parse arguments, measure, print, and write when asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="file of JSON lines: the machine, then a line per contender")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    machine = {
        **environment(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "integer_kernels": onednn.is_available(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    print(machine)
    with torch.inference_mode():
        parts = [bench_linear(*shape, rounds=arguments.rounds) for shape in SHAPES]
        few = max(3, arguments.rounds // 5)
        parts += [bench_matmul(name, left, right, few) for name, (left, right) in MATMULS.items()]
    rows = pd.concat(parts, ignore_index=True)
    print(rows.to_string(index=False, float_format="{:.3f}".format))
    if arguments.output:
        write_results(arguments.output, machine, rows.round(4).to_dict("records"))


if __name__ == "__main__":
    main()
