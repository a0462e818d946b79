"""Which instruction set the CPU kernels use: what the CPU has, limited by the switches of a user."""

from __future__ import annotations

import functools
import os
import platform

import torch

from harmoq_ao.common.errors import ConfigError, shown

SWITCH = "HARMOQ_CPU_KERNELS"
"""Environment variable: ``off``, or the highest instruction set to use."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
FLAGS = {
    "default": ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"),
    "avx2": ("-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", *_AVX2),
    "avx512": ("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", *_AVX512),
    "avx512_bf16": (
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", *_AVX512),
        *("-mavx512vnni", "-mavx512bf16"),
    ),
}
"""Options of the compiler for each instruction set, lowest first; ``default`` is what every CPU of the family has."""

NAMES = tuple(FLAGS)


@functools.cache
def best_of_cpu() -> str:
    """The highest instruction set that this CPU has."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "default"
    if not _has("_is_avx2_supported"):
        return "default"
    if not _has("_is_avx512_supported"):
        return "avx2"
    return "avx512_bf16" if _has("_is_avx512_bf16_supported") and _has("_is_vnni_supported") else "avx512"


def _has(query: str) -> bool:
    # torch has no public query that ATEN_CPU_CAPABILITY leaves alone; a query that is gone means: not that we know.
    return bool(getattr(torch.cpu, query, lambda: False)())


def chosen() -> str | None:
    """The instruction set to use, None where kernels are switched off.

    The lower of what the CPU has and what ``HARMOQ_CPU_KERNELS`` names; where that is not set, of what torch is limited
    to by ``ATEN_CPU_CAPABILITY``.

    Raises:
        ConfigError: ``HARMOQ_CPU_KERNELS`` has an unknown value.
    """
    setting = switch()
    if setting == "off":
        return None
    torch_limit = os.environ.get("ATEN_CPU_CAPABILITY", "")
    limit = setting or (torch_limit if torch_limit in ("default", "avx2") else NAMES[-1])
    return min(limit, best_of_cpu(), key=NAMES.index)


def switch() -> str | None:
    """What ``HARMOQ_CPU_KERNELS`` says, None where it is not set or empty.

    Raises:
        ConfigError: It has an unknown value.
    """
    setting = os.environ.get(SWITCH, "")
    if setting and setting != "off":
        check_name(setting, f"{SWITCH} has an unknown value", expected=f"off, {', '.join(NAMES)}, or no such variable")
    return setting or None


def check_name(name: str, what: str, *, expected: str = ", ".join(NAMES)) -> None:
    """Raise unless `name` is an instruction set.

    Raises:
        ConfigError: It is none.
    """
    if name not in NAMES:
        raise ConfigError(what, found=shown(name), expected=expected)
