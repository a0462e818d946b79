"""Small products on every instruction set that this CPU has: integers exact, floats within rounding."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cpu_kernels.helpers import OF_THIS_CPU, built

INTEGERS = [(torch.uint8, torch.int8), (torch.uint8, torch.uint8), (torch.int8, torch.int8)]
FLOATS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]


def numbers(kind: torch.dtype, rows: int, columns: int, seed: int, extreme: bool) -> Tensor:
    """A matrix; `extreme` integers are the largest in size, so that any narrow sum would overflow."""
    generator = torch.Generator().manual_seed(seed)
    if kind.is_floating_point:
        return torch.randn(rows, columns, generator=generator).to(kind)
    least, most = torch.iinfo(kind).min, torch.iinfo(kind).max
    if extreme:
        return torch.full((rows, columns), least if least < 0 else most, dtype=kind)
    return torch.randint(least, most + 1, (rows, columns), generator=generator, dtype=kind)


SIDES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 64, 65, 100]))
DEPTHS = st.one_of(st.integers(1, 20), st.sampled_from([60, 63, 64, 127, 128, 129, 180, 511, 512, 513, 1025]))


@pytest.mark.parametrize("own", [False, True], ids=["torch's", "own"])
@pytest.mark.parametrize("kinds", [*INTEGERS, *FLOATS], ids=str)
@given(m=SIDES, k=DEPTHS, n=SIDES, beside=st.integers(0, 3), seed=st.integers(0, 2**32 - 1), extreme=st.booleans())
def test_products(
    operators: ModuleType,
    kinds: tuple[torch.dtype, torch.dtype],
    own: bool,
    m: int,
    k: int,
    n: int,
    beside: int,
    seed: int,
    extreme: bool,
) -> None:
    left, right = kinds
    wide = numbers(left, m, k + beside, seed, extreme)
    if beside and left.is_floating_point:
        wide[:, k:] = torch.nan  # nobody may read what lies beside A
    a, b = wide[:, :k], numbers(right, k, n, seed + 1, extreme)
    found = operators.gemm(a, b, own=own)
    exact = a.double() @ b.double()
    if not left.is_floating_point:
        assert found.dtype == torch.int32
        assert torch.equal(found.double(), exact)
        return
    assert found.dtype == torch.float32
    # Each of k additions in float32 rounds by at most 2^-24 of the sum of sizes.
    bound = (k + 1) * 2**-24 * (a.double().abs() @ b.double().abs()) + 1e-30
    assert bool(((found.double() - exact).abs() <= bound).all())


def test_no_terms(operators: ModuleType) -> None:
    for kinds in (*INTEGERS, *FLOATS):
        found = operators.gemm(torch.empty(5, 0, dtype=kinds[0]), torch.empty(0, 7, dtype=kinds[1]))
        assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_without_onednn(operators: ModuleType) -> None:
    a, b = numbers(torch.uint8, 33, 70, 1, False), numbers(torch.int8, 70, 19, 2, False)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(operators.gemm(a, b).double(), a.double() @ b.double())


def test_types_that_are_not_multiplied(operators: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="gemm takes no"):
        operators.gemm(torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="gemm takes A"):
        operators.gemm(torch.zeros(2, 3), torch.zeros(2, 3))


def test_libraries_of_several_instruction_sets_share_nothing() -> None:
    spaces = [built(isa) for isa in OF_THIS_CPU]
    a, b = numbers(torch.uint8, 9, 30, 3, False), numbers(torch.int8, 30, 21, 4, False)
    assert all(torch.equal(space.gemm(a, b), spaces[0].gemm(a, b)) for space in spaces)
    paths = [path for path in torch.ops.loaded_libraries if "/kernels-" in path]
    assert len(paths) >= len(OF_THIS_CPU)
    for path in paths:
        listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
        assert listed.stdout == ""


PROGRAM = """
    import sys, torch
    from harmoq_ao.cpu_kernels.library import kernels
    operators = kernels(sys.argv[1])
    for left, right in [(torch.uint8, torch.int8), (torch.uint8, torch.uint8), (torch.int8, torch.int8)]:
        for k in (3, 4, 62, 64):
            a = torch.full((17, k), torch.iinfo(left).max, dtype=left)
            b = torch.full((k, 18), torch.iinfo(right).max, dtype=right)
            assert torch.equal(operators.gemm(a, b).double(), a.double() @ b.double()), (left, right, k)
    a, b = torch.randn(17, 65), torch.randn(65, 18)
    torch.testing.assert_close(operators.gemm(a, b), a @ b)
    torch.testing.assert_close(operators.gemm(a.bfloat16(), b.bfloat16()), a.bfloat16().float() @ b.bfloat16().float())
    print("exact")
"""


@pytest.mark.parametrize("limit", ["AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX2"])
@pytest.mark.parametrize("isa", [isa for isa in OF_THIS_CPU if isa.startswith("avx512")])
def test_micro_kernels_of_lesser_cpus(isa: str, limit: str) -> None:
    """oneDNN as on CPUs without AMX, bfloat16 or VNNI: what it refuses or saturates is not taken from it."""
    built(isa)
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), isa]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "exact\n", "")
