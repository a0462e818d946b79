"""Where the time of a row program goes: each chain is timed cut off after its first, second, ... instruction.

One thread; the minimum over rounds, because a shared machine only ever adds to it. An instruction's own time is the
difference to the chain without it.

    python -m benchmarks.cpu_rowwise --rows 16384
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.cpu_kernels import rowwise
from harmoq_ao.cpu_kernels.rowwise import Broadcast, Columns, Op, RowProgram
from harmoq_ao.quant.integer_reference import Affine, LinearOperands

Step = tuple[str, Callable[[RowProgram], None]]


def linear(program: RowProgram, to: Columns, source: Columns, k: int, n: int, shift: float) -> None:
    """A 4-bit linear (8-bit products all the same) with a joint scale."""
    generator = torch.Generator().manual_seed(k + n)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    act = Affine(torch.tensor(0.4), torch.tensor(-3.0), 4)
    operands = LinearOperands(codes, torch.full((n,), 0.02), torch.full((n,), shift), None, 4, act, torch.ones(k))
    places = [program.constant(c) for c in rowwise.linear_constants(operands)]
    program.emit(Op.LINEAR, to, source, k, n, 4, *places, *[-1] * (6 - len(places)))


def norm(program: RowProgram, to: Columns, source: Columns, width: int) -> None:
    """A layer norm with weight and bias."""
    vectors = [program.constant(torch.ones(width)) for _ in range(2)]
    program.emit(Op.LAYER_NORM, to, source, width, *vectors, program.number(1e-5))


def before_attention(width: int, shift: float) -> tuple[RowProgram, list[Step]]:
    """Norm, query, key and value in bfloat16."""
    normed = Columns(2)
    return RowProgram(1, [(3 * width, torch.bfloat16)], [width]), [
        ("norm", lambda p: norm(p, normed, Columns(0), width)),
        (f"{width}->{3 * width} bf16", lambda p: linear(p, Columns(1), normed, width, 3 * width, shift)),
    ]


def after_attention(width: int, hidden: int, shift: float) -> tuple[RowProgram, list[Step]]:
    """Projection and residual, norm, MLP and residual."""
    attended, shortcut, out, token, inner = map(Columns, range(5))
    add = Binary.ADD, Broadcast.NONE

    def residual(p: RowProgram, to: Columns, left: Columns, right: Columns) -> None:
        p.emit(Op.BINARY, add[0], to, left, right, width, add[1])

    return RowProgram(2, [(width, torch.float32)], [width, hidden]), [
        (f"{width}->{width}", lambda p: linear(p, out, attended, width, width, shift)),
        ("residual", lambda p: residual(p, out, out, shortcut)),
        ("norm", lambda p: norm(p, token, out, width)),
        (f"{width}->{hidden}", lambda p: linear(p, inner, token, width, hidden, shift)),
        ("GELU", lambda p: p.emit(Op.UNARY, Unary.GELU, inner, inner, hidden, -1)),
        (f"{hidden}->{width}", lambda p: linear(p, token, inner, hidden, width, shift)),
        ("residual", lambda p: residual(p, out, out, token)),
    ]


CHAINS = {
    "SwinIR-light, before attention": lambda shift: before_attention(60, shift),
    "SwinIR-light, after attention": lambda shift: after_attention(60, 120, shift),
    "HAT-S, before attention": lambda shift: before_attention(144, shift),
    "HAT-S, after attention": lambda shift: after_attention(144, 288, shift),
}


def shortest(run: Callable[[], object], rounds: int) -> float:
    """Milliseconds of the fastest call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def prefixes(program: RowProgram, steps: Iterable[Step]) -> Iterable[tuple[str, RowProgram]]:
    """The program after each of its instructions."""
    for name, emit in steps:
        emit(program)
        yield name, program


def main() -> None:
    """Print a table for each chain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--shift", type=float, default=0.5, help="weight codes' zero, in steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    for title, make in CHAINS.items():
        program, steps = make(arguments.shift)
        width = program.temporaries[0]
        inputs = [torch.randn(arguments.rows, width) for _ in range(program.inputs)]
        print(f"{title}, {arguments.rows} tokens")
        before = 0.0
        for name, prefix in prefixes(program, steps):
            now = shortest(partial(rowwise.rowwise, inputs, prefix, arguments.rows), arguments.rounds)
            print(f"  {name:<18}{now - before:8.3f} ms{now:9.3f} in all")
            before = now


if __name__ == "__main__":
    main()
