"""What the benchmarks of whole models share: inputs, statistics, and a description of the machine."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import torch

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.recipes import store
from harmoq_ao.recipes.store import write_json

__all__ = ["environment", "one_line", "paired_ratio", "percentiles", "random_image", "version_of", "write_json"]

_FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/'\"]+/)+")


def random_image(size: int, seed: int) -> torch.Tensor:
    """`[1, 3, size, size]`, uniform in 0..1, the same for the same seed."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds of at least two values."""
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
    """Machine, versions, and whether freed memory is kept: asking keeps it, for every contender alike."""
    versions = {name: version_of(name) for name in packages}
    return {**store.environment("cpu"), **versions, "keeps_memory": keep_memory()}


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
