"""Is the int8 linear faster than float on this CPU, quantization of its input included?

Times, in one process and interleaved, `onednn.linear` (static bounds, static with a joint scale, 8-bit mid-rise
weights, bounds per token) against ``F.linear`` in float32 and bfloat16, at the shapes of SwinIR-light and DAT-light, on
fresh random inputs in every round; then products of two quantized activations. Reports p20/p50/p80 in milliseconds and
the ratio of medians to float32 (above 1: faster than float32).

    python -m benchmarks.cpu_linear --threads 2 --output benchmarks/results/cpu_linear

Large outputs cost page faults that have nothing to do with the kernels, so freed memory is kept, for every contender
alike.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.kernels import float_matmul, onednn
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, LinearOperands, MatmulOperand

SHAPES = [(m, k, n) for m in (65536, 16384) for k, n in ((60, 180), (60, 120), (120, 60), (60, 60))]
MATMULS = {
    "attention scores [1536, 64, 10] x [1536, 10, 64]": ((1536, 64, 10), (1536, 10, 64)),
    "attention output [1536, 64, 64] x [1536, 64, 10]": ((1536, 64, 64), (1536, 64, 10)),
    "channel attention [6, 10, 65536] x [6, 65536, 10]": ((6, 10, 65536), (6, 65536, 10)),
}


@dataclass(frozen=True)
class Row:
    """One contender at one shape; times in milliseconds, ratio of the baseline's median to this one's."""

    shape: str
    contender: str
    p20: float
    p50: float
    p80: float
    ratio: float


def measure(contenders: dict[str, Callable[[], object]], rounds: int, refresh: Callable[[], None]) -> dict[str, list]:
    """Milliseconds of every contender, one call each per round, ``refresh`` (new inputs) before each round.

    The order rotates from round to round: what runs after a neighbour that read the same input finds it in the cache.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for round_ in range(rounds + 2):
        refresh()
        order.append(order.pop(0))
        for name in order:
            start = time.perf_counter()
            contenders[name]()
            if round_ >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def summarize(shape: str, times: dict[str, list]) -> list[Row]:
    """Quantiles; the first contender is the baseline."""
    baseline = statistics.median(next(iter(times.values())))
    rows = []
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=10)
        median = statistics.median(values)
        rows.append(
            Row(shape, name, round(cuts[1], 4), round(median, 4), round(cuts[7], 4), round(baseline / median, 3))
        )
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


def bench_linear(m: int, k: int, n: int, rounds: int) -> list[Row]:
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

    return summarize(f"{m}x{k}x{n}", measure(contenders, rounds, refresh))


def bench_matmul(name: str, left: tuple[int, ...], right: tuple[int, ...], rounds: int) -> list[Row]:
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
    return summarize(name, measure(contenders, rounds, refresh))


def cpu_name() -> str:
    """Model name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    parts = [names.get("model name", platform.processor() or platform.machine())]
    parts += [f"{key} {names[key]}" for key in ("cpu family", "model") if key in names]
    return ", ".join(parts)


def environment() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "integer_kernels": onednn.is_available(),
        "load_average": round(os.getloadavg()[0], 2),
        "keeps_memory": keep_memory(),
    }


def write(path: Path, machine: dict[str, object], rows: list[Row]) -> None:
    """``path.csv`` with the rows, ``path.json`` with the machine beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".json"):
        temporary = path.with_suffix(suffix + ".part")
        with temporary.open("w", newline="") as file:
            if suffix == ".csv":
                writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
                writer.writeheader()
                writer.writerows(asdict(row) for row in rows)
            else:
                json.dump({"machine": machine, "rows": [asdict(row) for row in rows]}, file, indent=1)
        os.replace(temporary, path.with_suffix(suffix))


def main() -> None:
    """Parse arguments, measure, print, and write when asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="path without suffix for the .csv and .json")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    machine, rows = environment(), []
    print(json.dumps(machine))
    with torch.inference_mode():
        for shape in SHAPES:
            rows += bench_linear(*shape, rounds=arguments.rounds)
        for name, (left, right) in MATMULS.items():
            rows += bench_matmul(name, left, right, max(3, arguments.rounds // 5))
    for row in rows:
        print(f"{row.shape:52s}{row.contender:36s}{row.p20:9.3f}{row.p50:9.3f}{row.p80:9.3f}  x{row.ratio:.2f}")
    if arguments.output:
        write(arguments.output, machine, rows)


if __name__ == "__main__":
    main()
