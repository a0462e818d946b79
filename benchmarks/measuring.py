"""What the benchmarks of whole models share: inputs, statistics, and a description of the machine."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.images import atomic_write

_FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/'\"]+/)+")


def random_image(size: int, seed: int) -> torch.Tensor:
    """`[1, 3, size, size]`, uniform in 0..1, the same for the same seed."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds; at least two values."""
    cuts = statistics.quantiles(seconds, n=5)
    values = {"p20_ms": cuts[0], "p50_ms": statistics.median(seconds), "p80_ms": cuts[-1]}
    return {name: round(1000 * value, 1) for name, value in values.items()}


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of how many times faster the other one was than the base in the same round.

    Raises:
        ValueError: Not as many rounds of one as of the other.
    """
    return statistics.median(b / o for b, o in zip(base, other, strict=True))


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """CPU, threads, versions, and whether freed memory is kept: asking keeps it, for every contender alike."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in packages},
        "keeps_memory": keep_memory(),
    }


def cpu_name() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor()


def version_of(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def one_line(error: Exception) -> str:
    """Type and first line of an error, without the folders of this machine, for a table of results."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {_FOLDERS.sub('', text)}"[:300]


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
