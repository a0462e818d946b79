"""Proxies that carry the example's real value, so that Python can ask questions about it.

``torch.fx``'s own proxies stop at ``len``, ``int``, tuple unpacking and every branch. Here each proxy holds the value
its node had on the example input. Where Python needs a concrete answer (a branch, an index, a length) the example's
answer is given and recorded as a *guard* in the graph: at run time the guard compares again, and a different answer
raises :class:`GuardFailed`, upon which another graph is traced. Nothing is assumed unguarded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from harmoq_ao.common.errors import TraceError
from harmoq_ao.common.tracing import is_traced
from harmoq_ao.graph.recorder import Recorder

#: What a proxy itself keeps; an author's assignment to anything else would be lost.
_OWN_ATTRIBUTES = frozenset({"_node", "attr", "node", "root", "tracer", "value"})


class GuardFailed(Exception):  # noqa: N818 - caught and answered, never an error of the user
    """A traced graph met a value on which its author's Python would have gone another way."""


def type_name(value: Any) -> str:
    if is_traced() and type(value).__name__ in ("FakeTensor", "FunctionalTensor", "StandIn"):
        return "Tensor"  # what stands for one while `torch.export` looks on
    return type(value).__name__


#: What Python may ask of a proxy, by the name a guard node carries.
QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "index": operator.index,
    "len": len,
    "type": type_name,
}


def check_guard(value: Any, question: str, expected: Any) -> None:
    """Run-time side of a guard: raise :class:`GuardFailed` unless the question's answer is still ``expected``."""
    answer = QUESTIONS[question](value)
    if answer != expected and not (answer != answer and expected != expected):  # NaN is the same answer as NaN
        raise GuardFailed(f"{question}: traced with {expected!r}, now {answer!r}")


class ValueProxy(fx.Proxy):
    """An FX proxy together with the value of its node on the example input."""

    tracer: Recorder  # type: ignore[assignment]

    def __init__(self, node: fx.Node, tracer: Recorder, value: Any) -> None:
        super().__init__(node, tracer)  # type: ignore[arg-type]
        self.value = value

    def __repr__(self) -> str:
        return f"ValueProxy({self.node.name})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocol look-ups (numpy, copy, pickle) must not become nodes
            raise AttributeError(name)
        return ValueAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN_ATTRIBUTES:
            raise TraceError(f"forward assigns .{name} of a value", remedy="leave this module float, by a rule")
        object.__setattr__(self, name, value)

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.guard(self, "bool"))

    def __int__(self) -> int:
        return int(self.tracer.guard(self, "int"))

    def __float__(self) -> float:
        return float(self.tracer.guard(self, "float"))

    def __index__(self) -> int:
        return int(self.tracer.guard(self, "index"))

    def __len__(self) -> int:
        return int(self.tracer.guard(self, "len"))

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", int, (self,), {})

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __divmod__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (self, other), {})

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: tuple[Any, ...] | None = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tracer = find_tracer((args, kwargs or {}))
        assert tracer is not None
        # A tensor's own method called with a proxy among the arguments (``weight @ proxy``) is a plain function here.
        return tracer.call_function(orig_method, args or (), kwargs or {})


class ValueAttribute(ValueProxy):
    """``proxy.name``: an attribute when it is read, a method when it is called."""

    def __init__(self, root: ValueProxy, name: str) -> None:
        self.root = root
        self.attr = name
        self.tracer = root.tracer
        self.value = getattr(root.value, name)
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            self._node = self.tracer.graph.create_node("call_function", getattr, (self.root.node, self.attr), {})
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def find_tracer(structure: Any) -> Recorder | None:
    """The tracer of the first proxy in a nested structure of tuples, lists, dicts and slices; None without one."""
    if isinstance(structure, ValueProxy):
        return structure.tracer
    if isinstance(structure, (tuple, list, set)):
        items: Any = structure
    elif isinstance(structure, dict):
        items = structure.values()
    elif isinstance(structure, slice):
        items = (structure.start, structure.stop, structure.step)
    else:
        return None
    for item in items:
        tracer = find_tracer(item)
        if tracer is not None:
            return tracer
    return None


def _inplace(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: ValueProxy, other: Any) -> Any:
        in_place = isinstance(self.value, torch.Tensor)
        target = function if in_place else getattr(operator, function.__name__.lstrip("i"), function)
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(ValueProxy, f"__i{_name}__", _inplace(getattr(operator, f"i{_name}")))
