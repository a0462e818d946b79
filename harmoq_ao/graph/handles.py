"""What stands for a module, ``self`` included, while a forward runs on proxies."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from harmoq_ao.common.errors import TraceError
from harmoq_ao.graph.exchange import original_class
from harmoq_ao.graph.namespaces import package_of
from harmoq_ao.graph.recorder import Recorder


class ModuleHandle:
    """Stands for a module (or ``self``) while its forward runs on proxies."""

    __slots__ = ("_children", "_module", "_path", "_tracer")

    def __init__(self, tracer: Recorder, module: nn.Module, path: str) -> None:
        object.__setattr__(self, "_tracer", tracer)
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_path", path)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return original_class(self._module)

    def __getattr__(self, name: str) -> Any:
        module = self._module
        static = inspect.getattr_static(type(module), name, None)
        if isinstance(static, property) and package_of(type(module).__module__) != "torch":
            assert static.fget is not None
            return static.fget(self)
        if isinstance(static, types.FunctionType):
            if name == "forward" and self._path == "":
                static = self.__class__.forward  # type: ignore[attr-defined]
            elif package_of(static.__module__) == "torch" and not name.startswith("_"):
                return getattr(module, name)
            return types.MethodType(static, self)
        path = f"{self._path}.{name}" if self._path else name
        if path in self._tracer.assigned:
            return self._tracer.assigned[path]
        self._tracer.read.add(path)
        return self._tracer.attribute(getattr(module, name), path)

    def __setattr__(self, name: str, value: Any) -> None:
        path = f"{self._path}.{name}" if self._path else name
        if path in self._tracer.read:
            raise TraceError(f"forward keeps state in self.{name}", remedy="leave this module float, by a rule")
        self._tracer.create_proxy("call_function", setattr, (self, name, value), {})
        self._tracer.assigned[path] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.create_proxy("call_module", self._path, args, kwargs)

    def __len__(self) -> int:
        return len(self._module)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._module, (nn.ModuleDict, nn.ParameterDict)):
            return iter(self._module)
        return iter([self[i] for i in range(len(self))])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        if isinstance(self._module, (nn.ModuleList, nn.Sequential)):
            key = operator.index(key) % len(self)
            name = list(self._module._modules)[key]
        else:
            name = str(key)
        child = self._module[key]
        return self._tracer.attribute(child, f"{self._path}.{name}" if self._path else name)
