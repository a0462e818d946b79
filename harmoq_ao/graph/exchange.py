"""Another forward for a module that stays the same object: its class becomes one derived from its own.

Attributes, names of parameters and whoever holds the module stay as they are, as with ``fully_shard``. All that is kept
for the new forward lies in one typed object, the module's :class:`Replacement`; it is copied with the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import nn

from harmoq_ao.graph.nodes import SELF

_classes: dict[type[nn.Module], type[nn.Module]] = {}


class Replacement:
    """What runs in place of a module's own forward, with everything it keeps between calls."""

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call of `module`."""
        raise NotImplementedError

    def forget(self, module: nn.Module) -> None:
        """Drop what was computed from the module's tensors; called when their type changes."""

    def to_pickle(self) -> Replacement:
        """What of it another process can use; the rest is made again there."""
        return self

    def own_buffers(self) -> list[str]:
        """Names of the buffers that it put into the module, and makes again."""
        return []


R = TypeVar("R", bound=Replacement)


def exchange(module: nn.Module, replacement: Replacement) -> None:
    """Let `replacement` answer the calls of a module, whose class becomes one derived from its own, in place."""
    cls = type(module)
    if cls not in _classes:  # one base only: a mixin would change the object's layout, which forbids it
        _classes[cls] = type(cls)(f"{cls.__name__}Exchanged", (cls,), _members(cls))  # type: ignore[misc]
    module.__class__ = _classes[cls]
    module.harmoq_replacement = replacement  # type: ignore[assignment]


def _members(cls: type[nn.Module]) -> dict[str, Any]:
    return {
        "__module__": cls.__module__,
        "forward": _forward,
        "_apply": _apply,
        "__reduce_ex__": _reduce,
        "__deepcopy__": getattr(cls, "__deepcopy__", _deepcopy),
        "harmoq_original_class": cls,
        "harmoq_replacement": None,  # a slice of a sequence is of its class, and has no replacement of its own
        SELF: property(lambda self: self, doc="The island itself, for opaque method calls in its graphs."),
    }


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    replacement = replacement_of(self, Replacement)
    if replacement is None:
        return original_class(self).forward(self, *args, **kwargs)
    return replacement.forward(self, args, kwargs)


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``; what was derived in another type is forgotten, because rounding it would be less exact."""
    before = [t.dtype for t in self.parameters()] + [t.dtype for t in self.buffers()]
    result: nn.Module = original_class(self)._apply(self, fn, recurse)
    replacement = replacement_of(self, Replacement)
    if replacement is not None and before != [t.dtype for t in self.parameters()] + [t.dtype for t in self.buffers()]:
        replacement.forget(self)
    return result


def _reduce(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    """Pickled as its author's class, which another process can import, and what replaces its forward."""
    replacement = replacement_of(self, Replacement)
    state = {name: value for name, value in vars(self).items() if name != "harmoq_replacement"}
    if replacement is not None:
        derived = replacement.own_buffers()
        state["_buffers"] = {name: value for name, value in self._buffers.items() if name not in derived}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set.difference(derived)
    return _restored, (original_class(self), replacement and replacement.to_pickle()), state


def _restored(cls: type[nn.Module], replacement: Replacement | None) -> nn.Module:
    module = cls.__new__(cls)
    if replacement is not None:
        exchange(module, replacement)
    return module


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with everything that its replacement keeps, unlike a pickle."""
    twin = type(self).__new__(type(self))
    memo[id(self)] = twin
    vars(twin).update(copy.deepcopy(vars(self), memo))
    return twin


def original_class(module: nn.Module) -> type[Any]:
    """The author's class of a module, exchanged or not."""
    return getattr(type(module), "harmoq_original_class", type(module))


def replacement_of(module: nn.Module, kind: type[R]) -> R | None:
    """The replacement of a module's forward if there is one of this kind."""
    found = getattr(module, "harmoq_replacement", None)
    return found if isinstance(found, kind) else None
