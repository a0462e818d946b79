"""Prepares kernels for an H100 that is not there: `python rehearsal.py`, on a machine without a GPU.

One problem of each form that `benchmarks.gpu` checks, and all of one model that it times, with their operands and the
arguments of their launches; Triton compiles what would be launched, and nothing runs. Prints the name of each.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu.problems import checks, sanitized, timings

_H100 = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
_run = JITFunction.run


def _compile_only(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
    assert not warmup
    return _run(kernel, *arguments, warmup=True, **options)


def main() -> None:
    """Compile, and print names."""
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: _H100),
    )
    driver.set_active(gpu)
    problems = [checks(tiny=False)[name] for name in sanitized(tiny=False)]
    problems += [problem for name, problem in timings(tiny=False).items() if "swinir-light" in name]
    with mock.patch.object(JITFunction, "run", _compile_only):
        for problem in problems:
            problem.make(torch.device("cpu")).run()
            print(problem.name, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
