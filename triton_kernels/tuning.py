"""Launch configurations: defaults, and measured ones kept on disk for each GPU and Triton version.

A configuration changes how fast a kernel runs and never what it computes. Nothing is measured on the side: `tune` does,
once for a kernel and a shape, and the launchers then find the result.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
import triton

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        num_warps: Warps of 32 threads in a program.
        num_stages: Depth of the software pipeline of loads.
        blocks: Block sizes by the names of the kernel's constexprs.
    """

    num_warps: int = 4
    num_stages: int = 2
    blocks: Mapping[str, int] = field(default_factory=dict)


def default(kernel: str, *, num_warps: int = 4, num_stages: int = 2, **blocks: int) -> Config:
    """The configuration measured for ``kernel`` with these block sizes as its key, else exactly what is given."""
    given = Config(num_warps, num_stages, blocks)
    if not torch.cuda.is_available():
        return given
    return load().get(key(kernel, given), given)


def key(kernel: str, config: Config) -> str:
    """Name of a default configuration in the file."""
    sizes = ",".join(f"{name}={size}" for name, size in sorted(config.blocks.items()))
    return f"{kernel}({sizes}) warps={config.num_warps} stages={config.num_stages}"


def tune(kernel: str, start: Config, candidates: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """Time ``run`` with each candidate, keep the fastest on disk for ``start``, and return it.

    Args:
        kernel: Name of the kernel.
        start: The default that the launcher would use.
        candidates: What to try besides it; one that does not compile or run is left out.
        run: Launches the kernel with a configuration. Inputs should be fresh and random.
    """
    if not torch.cuda.is_available():
        return start
    times: list[tuple[float, Config]] = []
    for config in (start, *candidates):
        try:
            times.append((float(triton.testing.do_bench(lambda config=config: run(config))), config))
        except (RuntimeError, triton.TritonError) as error:
            logger.info("%s with %s does not run: %s", kernel, config, error)
    if not times:
        return start
    best = min(times, key=lambda pair: pair[0])[1]
    save({**load(), key(kernel, start): best})
    return best


def path() -> Path:
    """File of this GPU and Triton version, below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return Path(base) / "harmoq_ao" / f"tuning-{gpu.replace(' ', '_').replace('/', '_')}-{triton.__version__}.json"


def load() -> dict[str, Config]:
    """Configurations on disk; none if there is no file, or with a warning if it is damaged."""
    return _read(path())


@cache
def _read(file: Path) -> dict[str, Config]:
    try:
        stored = json.loads(file.read_text())
        return {name: _config(values) for name, values in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # whatever a damaged file holds
        logger.warning("Ignoring the damaged tuning file %s: %s", file, error)
        return {}


def _config(values: Mapping[str, object]) -> Config:
    warps, stages, sizes = values["num_warps"], values["num_stages"], values["blocks"]
    if not (isinstance(warps, int) and isinstance(stages, int) and isinstance(sizes, dict)):
        raise TypeError(f"not a configuration: {values}")
    return Config(warps, stages, {str(name): int(size) for name, size in sizes.items()})


def save(configs: Mapping[str, Config]) -> None:
    """Write the file of this GPU in one step: a reader sees the old or the new one, never half of it."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(config) for name, config in sorted(configs.items())}, indent=1)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        Path(name).replace(file)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    _read.cache_clear()


__all__ = ["Config", "default", "key", "load", "path", "save", "tune"]
