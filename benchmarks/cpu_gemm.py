"""How fast are the small products that CPU kernels are made of, on each instruction set that this CPU has?

One thread, one process, contenders taking turns; the best of all rounds, because what disturbs a measurement of
microseconds only ever adds to it. The products lie in the first-level cache. Prints a table of billions of
multiply-adds per second.

    python -m benchmarks.cpu_gemm

`avx2` and `default` are ours alone. The columns with AVX-512 are torch's micro-kernels where they work, and ours, which
are used elsewhere (no VNNI, no oneDNN).
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from harmoq_ao.cpu_kernels.instruction_sets import NAMES, best_of_cpu
from harmoq_ao.cpu_kernels.library import kernels, status

U8, S8, BF16, F32 = torch.uint8, torch.int8, torch.bfloat16, torch.float32
#: Types, M, K, N: qkv of a window at 60 channels; scores and values of attention.
PRODUCTS = [
    (U8, S8, 64, 60, 180),
    (U8, U8, 64, 16, 64),
    (U8, U8, 64, 64, 16),
    (BF16, BF16, 64, 64, 256),
    (F32, F32, 64, 256, 16),
    (F32, F32, 64, 16, 256),
]


def numbers(kind: torch.dtype, rows: int, columns: int) -> Tensor:
    """A random matrix; integers up to 127."""
    if kind.is_floating_point:
        return torch.randn(rows, columns).to(kind)
    return torch.randint(0, 128, (rows, columns), dtype=kind)


def measure(rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each of `PRODUCTS`, for each contender."""
    isas = NAMES[: NAMES.index(best_of_cpu()) + 1]
    contenders = [(isa, own) for isa in isas for own in ((False, True) if isa.startswith("avx512") else (True,))]
    operands = [(numbers(left, m, k), numbers(right, k, n)) for left, right, m, k, n in PRODUCTS]
    best = {contender: [float("inf")] * len(operands) for contender in contenders}
    for _ in range(rounds):
        for index, (a, b) in enumerate(operands):
            for isa, own in contenders:
                library = kernels(isa)
                if library is None:
                    raise SystemExit(status(isa).sentence)
                start = time.perf_counter()
                library.gemm(a, b, own=own, repeats=repeats)
                seconds = (time.perf_counter() - start) / repeats
                best[isa, own][index] = min(best[isa, own][index], seconds)
    return {f"{isa}, ours" if own else f"{isa}, torch's": times for (isa, own), times in best.items()}


def table(seconds: dict[str, list[float]]) -> str:
    """Billions of multiply-adds per second, in Markdown."""
    lines = ["| product, M x K x N | " + " | ".join(seconds) + " |", "|---|" + "--:|" * len(seconds)]
    for index, (left, right, m, k, n) in enumerate(PRODUCTS):
        types = f"{left} x {right}".replace("torch.", "")
        rates = " | ".join(f"{m * k * n / times[index] / 1e9:.0f}" for times in seconds.values())
        lines.append(f"| {types}, {m} x {k} x {n} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=300, help="products in a row in each round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(measure(arguments.rounds, arguments.repeats)))


if __name__ == "__main__":
    main()
