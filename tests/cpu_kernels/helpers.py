"""The operators of every instruction set that this CPU has."""

from __future__ import annotations

from types import ModuleType

import pytest

from harmoq_ao.cpu_kernels.compiler import BuildFailure, find_compiler
from harmoq_ao.cpu_kernels.instruction_sets import NAMES, best_of_cpu
from harmoq_ao.cpu_kernels.library import kernels, status

OF_THIS_CPU = NAMES[: NAMES.index(best_of_cpu()) + 1]


def built(isa: str) -> ModuleType:
    """Its operators; skips the test where there is no compiler."""
    try:
        find_compiler()
    except BuildFailure as missing:
        pytest.skip(f"needs a C++ compiler: {missing.reason}")
    operators = kernels(isa)
    assert operators is not None, status(isa).sentence
    return operators
