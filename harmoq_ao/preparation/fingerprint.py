"""What a model's preparation depends on besides its weights, as one check sum: its modules, settings and source."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

#: To be raised with every change of what becomes an island or a site, and of how sites are named and found again.
RULES = 2

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size)
_FOREIGN = frozenset({"builtins", "collections", "typing", "abc", "torch", "numpy"})


def fingerprint(model: nn.Module) -> str | None:
    """SHA-256 of the author's source, of the classes of all modules and of their plain attributes.

    Two models of one fingerprint have their contractions in the same places, under the same names. Lines are counted
    as this minor version of Python counts them, so that it is a part as well.

    Args:
        model: A float model, before anything of it is exchanged.

    Returns:
        64 hexadecimal digits; None where the source of a class is not in a file (a notebook, a prompt).
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    sources = _sources({cls.__module__ for cls in classes if _root(cls.__module__) not in _FOREIGN})
    if sources is None:
        return None
    digest = hashlib.sha256(f"{RULES} {sys.version_info[:2]}".encode())
    for source in sorted(sources):
        digest.update(source)
    for name, module in model.named_modules():
        cls = type(module)
        digest.update(f"{name}:{cls.__module__}.{cls.__qualname__}{_plain_attributes(module)}".encode())
    return digest.hexdigest()


def _plain_attributes(module: nn.Module) -> list[tuple[str, str]]:
    own = sorted((name, value) for name, value in vars(module).items() if name[0] != "_" and name != "training")
    return [(name, _written(value)) for name, value in own]


def _written(value: Any, depth: int = 0) -> str:
    """A plain value or a container of some as text; of anything else the type."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)) and depth < 4:
        return f"{type(value).__name__}({','.join(_written(v, depth + 1) for v in value)})"
    if isinstance(value, dict) and depth < 4:
        items = sorted(f"{k!r}:{_written(v, depth + 1)}" for k, v in value.items())  # a config's JSON is sorted as well
        return "{" + ",".join(items) + "}"
    return type(value).__qualname__


def _sources(names: set[str]) -> list[bytes] | None:
    """Check sums of Python modules and of those of the same packages that they use; None if one has no file."""
    found: dict[str, bytes] = {}
    todo = sorted(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or not isinstance(file, str) or not file.endswith(".py"):
            return None
        try:
            found[name] = _file_digest(file)
        except OSError:
            return None
        todo.extend(other for other in _used(module) if other in sys.modules and other not in found)
    return list(found.values())


@functools.lru_cache(maxsize=512)
def _file_digest(file: str) -> bytes:
    """Of a source file as it was when first asked: later edits are not what this process runs."""
    return hashlib.sha256(Path(file).read_bytes()).digest()


def _used(module: ModuleType) -> Iterator[str]:
    """Names of the modules of the same top-level package whose objects are among a module's globals, but its root's."""
    root = _root(module.__name__)
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str) and name != root and _root(name) == root:
            yield name


def _root(name: str) -> str:
    return name.partition(".")[0]
