"""Where the time of a quantized model's program goes on this CPU: each kind of kernel, within whole runs.

    python -m benchmarks.cpu_program --model swinir-light

Prints milliseconds of a run and the calls of each kind, medians over runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, fx

from benchmarks.cpu_peers import MODELS, Job, quantized_model
from benchmarks.measuring import random_image
from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.config import Profile
from harmoq_ao.cpu_kernels import library
from harmoq_ao.programs.program import HALF, make_program


class Timed(fx.Interpreter):
    """Runs a program and adds up the seconds and calls of each kind of module."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def call_module(self, target: str, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        start = time.perf_counter()
        result: Tensor = super().call_module(target, args, kwargs)
        self.seconds[type(self.fetch_attr(target)).__name__].append(time.perf_counter() - start)
        return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="swinir-light")
    parser.add_argument("--bits", type=int, default=8, help="of weights and activations")
    parser.add_argument("--profile", choices=get_args(Profile), default="deploy")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/cpu_peers"))
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    model = quantized_model(Job(options.model, options.size, options.work), options.bits, profile=options.profile)
    program = make_program(model.model, random_image(options.size, 0), library.status().isa == HALF)
    found: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = {}
    with torch.no_grad():
        for seed in range(options.runs + 2):
            timed = Timed(program)
            timed.run(random_image(options.size, seed))
            for kind, seconds in timed.seconds.items() if seed >= 2 else ():  # the first runs warm up
                found[kind].append(sum(seconds))
                calls[kind] = len(seconds)
    medians = {kind: 1000 * statistics.median(seconds) for kind, seconds in found.items()}
    for kind, milliseconds in sorted(medians.items(), key=lambda item: -item[1]):
        count = calls[kind]
        print(f"{kind:16} {milliseconds:8.1f} ms in {count:4} calls, {milliseconds / count:6.2f} each")


if __name__ == "__main__":
    main()
