"""What an author's module sees while one of its forwards is traced.

C functions either refuse a proxy (``torch.zeros((b, n))``) or quietly ask it for a number (``torch.roll(x, shift)``),
which would pin a graph to one image size. So the *globals* of the author's own Python modules are exchanged while a
forward is traced, and only there: libraries (``torch``, ``F``, ``math``, einops' functions) become namespaces whose
functions turn into one graph node when they meet a proxy, and ``int``, ``len``, ``isinstance``, ``min`` and their like
learn about proxies. The author's own functions stay as they are, so that the tracer goes inside them, except those
found to be untraceable, which become one opaque node.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harmoq_ao.graph.proxies import ValueProxy, find_tracer
from harmoq_ao.graph.recorder import Recorder

#: Tensor factories are nodes even without a proxy among their arguments: a constant must follow the model's device.
FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "tensor", "zeros"),
        *("normal", "rand", "randint", "randn", "randperm"),
    )
)
_PYTHON_BUILTINS = ("abs", "divmod", "float", "int", "isinstance", "max", "min", "pow", "round", "sum")


class _Active(threading.local):
    """The tracers at work in this thread, innermost last; None while example values are computed.

    The author's globals are exchanged for every thread, but only the thread that traces has a tracer: to all others
    the exchanged functions are the plain ones.
    """

    def __init__(self) -> None:
        self.stack: list[Recorder | None] = []


_active = _Active()


def active_tracer() -> Recorder | None:
    """The tracer whose forward is running in this thread now, or None."""
    return _active.stack[-1] if _active.stack else None


@contextmanager
def activate(tracer: Recorder | None) -> Iterator[None]:
    """Make ``tracer`` this thread's active one; None suspends tracing, so that real values can be computed."""
    _active.stack.append(tracer)
    try:
        yield
    finally:
        _active.stack.pop()


class TracedFunction:
    """A library function, or an opaque helper, that becomes one graph node when it meets a proxy."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer = active_tracer()
        args = tuple(plain_type(a) for a in args)
        kwargs = {name: plain_type(value) for name, value in kwargs.items()}
        if tracer is None:
            return self.function(*args, **kwargs)
        return tracer.call_function(self.function, args, kwargs)


class _TracedType:
    """Stands for ``int`` or ``float``: a conversion that becomes a node; still usable in ``isinstance``."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if active_tracer() is not None and args and isinstance(args[0], ValueProxy):
            return active_tracer().create_proxy("call_function", self.kind, args, kwargs)  # type: ignore[union-attr]
        return self.kind(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind, name)


def plain_type(value: Any) -> Any:
    """``int`` for the stand-in of ``int`` (``dtype=int``), anything else as it is."""
    return value.kind if isinstance(value, _TracedType) else value


class TracedNamespace:
    """A library module whose functions are :class:`TracedFunction` and whose submodules are namespaces again."""

    def __init__(self, module: types.ModuleType) -> None:
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        value = wrap_library_value(getattr(self._module, name))
        self.__dict__[name] = value
        return value


def wrap_library_value(value: Any) -> Any:
    """The traced stand-in of one library value; classes and constants stay what they are."""
    if isinstance(value, types.ModuleType):
        return TracedNamespace(value)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) or type(value).__name__ == "ufunc":
        return TracedFunction(value)
    return value


def _isinstance(instance: Any, kinds: Any) -> bool:
    def real(kind: Any) -> Any:
        if isinstance(kind, _TracedType):
            return kind.kind
        return tuple(real(k) for k in kind) if isinstance(kind, tuple) else kind

    if isinstance(instance, ValueProxy):
        if not isinstance(instance.value, torch.Tensor):
            instance.tracer.guard(instance, "type")
        return isinstance(instance.value, real(kinds))
    return isinstance(instance, real(kinds))


def _python_builtin(name: str) -> Any:
    if name == "isinstance":
        return _isinstance
    function = getattr(builtins, name)
    return _TracedType(function) if isinstance(function, type) else _TracedBuiltin(function)


class _TracedBuiltin(TracedFunction):
    """``min``, ``max``, ``sum`` ...: a node with numbers, plain Python without proxies."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer = active_tracer()
        if tracer is None or find_tracer((args, kwargs)) is None:
            return self.function(*args, **kwargs)
        return tracer.create_proxy("call_function", self.function, args, kwargs)


def package_of(module_name: str) -> str:
    """Top-level package of a module name; the author's code is what shares it."""
    return module_name.partition(".")[0]


def author_modules(cls: type) -> list[types.ModuleType]:
    """Python modules of the author's package that the methods of ``cls`` can reach through their globals."""
    home = package_of(cls.__module__)
    todo = [sys.modules[c.__module__] for c in cls.__mro__ if package_of(c.__module__) == home]
    if home == "torch":  # torch.nn.MultiheadAttention and its like: only the module itself
        return todo[:1]
    found: dict[str, types.ModuleType] = {}
    while todo:
        module = todo.pop()
        if module.__name__ in found:
            continue
        found[module.__name__] = module
        for value in list(vars(module).values()):
            name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and package_of(name) == home and name in sys.modules:
                todo.append(sys.modules[name])
    return list(found.values())


_plans: dict[str, dict[str, Any]] = {}


def _plan(module: types.ModuleType, home: str) -> dict[str, Any]:
    """Replacements for one author module's globals (computed once, from its untouched globals)."""
    plan = _plans.get(module.__name__)
    if plan is None:
        plan = {name: _python_builtin(name) for name in _PYTHON_BUILTINS if name not in vars(module)}
        for name, value in vars(module).items():
            owner = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if name.startswith("__") or (isinstance(owner, str) and package_of(owner) == home and home != "torch"):
                continue
            wrapped = wrap_library_value(value)
            if wrapped is not value:
                plan[name] = wrapped
        _plans[module.__name__] = plan
    return plan


_patched: set[str] = set()
_MISSING = object()


class _Exchanges:
    """Entries of namespaces that are exchanged for a while."""

    def __init__(self) -> None:
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._modules: list[str] = []

    def put(self, namespace: dict[str, Any], name: str, value: Any) -> None:
        """Exchange one entry."""
        self._saved.append((namespace, name, namespace.get(name, _MISSING)))
        namespace[name] = value

    def patch(self, module: types.ModuleType, home: str) -> None:
        """Exchange the globals of an author's module; nothing where that was done."""
        if module.__name__ in _patched:
            return
        _patched.add(module.__name__)
        self._modules.append(module.__name__)
        for name, value in _plan(module, home).items():
            self.put(vars(module), name, value)

    def undo(self) -> None:
        """Put everything back."""
        for namespace, name, value in reversed(self._saved):
            if value is _MISSING:
                namespace.pop(name, None)
            else:
                namespace[name] = value
        _patched.difference_update(self._modules)


@contextmanager
def traced_globals(cls: type, opaque: list[tuple[dict[str, Any], str]]) -> Iterator[None]:
    """Exchange the globals of every author module that ``cls`` can reach; nested use patches each module once.

    What an author's function imports when it runs is exchanged as well, for the thread that traces.

    Args:
        cls: Class whose forward is traced.
        opaque: Author helpers to treat as one node, as (globals, name).
    """
    home = package_of(cls.__module__)
    exchanges = _Exchanges()
    try:
        for module in author_modules(cls):
            exchanges.patch(module, home)
        for namespace, name in opaque:
            exchanges.put(namespace, name, TracedFunction(namespace[name]))
        exchanges.put(vars(builtins), "__import__", _importing(exchanges, home, builtins.__import__))
        yield
    finally:
        exchanges.undo()


def _importing(exchanges: _Exchanges, home: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """``import`` within an author's function that is traced: of a library its namespace, of the author's the same."""

    def traced_import(
        name: str,
        globals: dict[str, Any] | None = None,
        locals: dict[str, Any] | None = None,
        fromlist: tuple[str, ...] | None = (),
        level: int = 0,
    ) -> Any:
        module = plain(name, globals, locals, fromlist, level)
        importer = (globals or {}).get("__name__", "")
        if active_tracer() is None or home == "torch" or package_of(importer) != home:
            return module
        if package_of(module.__name__) != home:
            return TracedNamespace(module)
        for part in (module, *(vars(module).get(n) for n in fromlist or ())):
            found = part if isinstance(part, types.ModuleType) else sys.modules.get(getattr(part, "__module__", ""))
            if found is not None and package_of(found.__name__) == home:
                exchanges.patch(found, home)
        return module

    return traced_import


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a composite torch function that runs its Python body on proxies instead of dispatching on them."""
    home = importlib.import_module(function.__module__)
    scope = dict(vars(home))
    for name in _PYTHON_BUILTINS:
        scope[name] = _python_builtin(name)
    for name, value in vars(home).items():
        if isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            scope[name] = wrap_library_value(value)
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        scope[name] = lambda *_: False
    code = function.__code__
    copy = types.FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
