"""The C++ kernels as one shared library per instruction set, built at first use and kept in a cache."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = {
    "avx2": "-DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c",
    "avx512": "-DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512 -mavx2 -mfma -mf16c "
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq",
    "avx512_bf16": "-DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512 -mavx2 -mfma -mf16c "
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16",
}


def instruction_set() -> str:
    chosen = os.environ.get("HARMOQ_CPU_KERNELS")
    if chosen:
        return chosen
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return "avx512" if torch.cpu._is_avx512_supported() else "avx2"


@functools.cache
def kernels(isa: str | None = None):
    """The namespace of operators of an instruction set."""
    isa = isa or instruction_set()
    torch.ops.load_library(build(isa))
    return getattr(torch.ops, f"harmoq_{isa}")


def build(isa: str) -> str:
    root = Path(torch.__file__).parent
    flags = (
        f"-std=c++20 -O3 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -DHARMOQ_NAMESPACE=harmoq_{isa} "
        f"-DAT_PARALLEL_OPENMP=1 -D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)} "
        f"{_FLAGS[isa]} -I{root}/include -I{root}/include/torch/csrc/api/include"
    ).split()
    sources = sorted(_SOURCES.glob("*.cpp"))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "harmoq-ao"
    cache.mkdir(parents=True, exist_ok=True)
    headers = b"".join(p.read_bytes() for p in sorted(_SOURCES.glob("*.h")))

    def compile_one(source: Path) -> str:
        key = hashlib.sha256(" ".join(flags).encode() + headers + source.read_bytes()).hexdigest()[:16]
        target = cache / f"{source.stem}-{isa}-{key}.o"
        if not target.exists():
            subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    key = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
    library = cache / f"kernels-{isa}-{key}.so"
    if not library.exists():
        gomp = next(root.glob("lib/libgomp*.so*"))
        subprocess.run(
            ["g++", "-shared", *objects, "-o", str(library), f"-L{root}/lib", "-lc10", "-ltorch_cpu", str(gomp)], check=True
        )
    return str(library)
