"""Another forward for a module that stays the same object: its class becomes one derived from its own.

Attributes, names of parameters and whoever holds the module stay as they are, as with ``fully_shard``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def exchange_class(module: nn.Module, kind: str, members: Callable[[type[nn.Module]], dict[str, Any]]) -> None:
    """Give a module a class derived from its own.

    Args:
        module: Changed in place.
        kind: Ends the name of the class; modules of one class and kind share it.
        members: Makes the members of the derived class from the module's class.
    """
    cls = type(module)
    if (cls, kind) not in _classes:  # one base only: a mixin would change the object's layout, which forbids it
        body = {"__module__": cls.__module__, **members(cls)}
        _classes[cls, kind] = type(cls)(f"{cls.__name__}{kind}", (cls,), body)  # type: ignore[misc]
    module.__class__ = _classes[cls, kind]
