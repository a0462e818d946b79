"""One forward of one island to one FX graph, by running it on proxies that carry the example's values.

The module itself is never touched: ``forward`` runs with a :class:`ModuleHandle` in place of ``self``, which hands out
parameters as ``get_attr`` nodes and children as ``call_module`` nodes. The graph's code is compiled into a function of
the live module, so that moved, swapped or deleted parameters are always the current ones.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import logging
import operator
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from harmoq_ao.errors import TraceError
from harmoq_ao.tracing.contractions import Contraction, SourceKey, contraction_op
from harmoq_ao.tracing.namespaces import (
    FACTORIES,
    activate,
    inlined,
    package_of,
    traced_globals,
)
from harmoq_ao.tracing.proxies import QUESTIONS, ValueAttribute, ValueProxy, check_guard, find_tracer

logger = logging.getLogger(__name__)

#: Attribute under which an island offers itself, so that an opaque method call has a node for ``self``.
SELF = "harmoq_self"
_INLINED = {F.multi_head_attention_forward: inlined(F.multi_head_attention_forward)}
_PASS_THROUGH = {"dropout", "to", "type_as", "contiguous", "float", "half", "identity", "reshape", "view", "type"}
_MAX_RESTARTS = 24
_counter = itertools.count()

SiteFactory = Callable[[nn.Module, Contraction], str | None]


@dataclass
class Variant:
    """One traced calling pattern of an island.

    Args:
        graph: The FX graph; its ``call_module`` targets are attributes of the island.
        run: Compiled graph, called with the live island and the dynamic leaves of its arguments.
        contractions: Number of contractions that became sites or were deliberately left as plain calls.
        opaque: Names of helpers that became one opaque node.
    """

    graph: fx.Graph
    run: Callable[..., Any]
    contractions: int
    opaque: tuple[str, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        return self  # immutable: the module is an argument of ``run``


class ModuleHandle:
    """Stands for a module (or ``self``) while its forward runs on proxies."""

    __slots__ = ("_children", "_module", "_path", "_tracer")

    def __init__(self, tracer: IslandTracer, module: nn.Module, path: str) -> None:
        object.__setattr__(self, "_tracer", tracer)
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_path", path)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return getattr(self._module, "harmoq_original_class", type(self._module))

    def __getattr__(self, name: str) -> Any:
        module = self._module
        static = inspect.getattr_static(type(module), name, None)
        if isinstance(static, property) and package_of(type(module).__module__) != "torch":
            assert static.fget is not None
            return static.fget(self)
        if isinstance(static, types.FunctionType):
            if name == "forward" and self._path == "":
                static = self.__class__.forward
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
        return len(self._module)  # type: ignore[arg-type]

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
        child = self._module[key]  # type: ignore[index]
        return self._tracer.attribute(child, f"{self._path}.{name}" if self._path else name)


class IslandTracer(fx.Tracer):
    """Runs one island's forward on proxies and records its graph.

    Args:
        root: The island.
        site_factory: Called at each contraction; returns the attribute of ``root`` holding the site's module, or None
            to leave the call as it is.
    """

    def __init__(self, root: nn.Module, site_factory: SiteFactory) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.site_factory = site_factory
        self.contractions = 0
        self._attributes: dict[str, Any] = {}
        self._occurrences: dict[tuple[str, int], int] = {}
        self.read: set[str] = set()  # attributes that forward has read, and those it has assigned
        self.assigned: dict[str, Any] = {}
        self._paths = {id(t): name for name, t in _named_tensors(root)}
        self._module_paths = {id(m): name for name, m in root.named_modules()}

    # -- values ------------------------------------------------------------------------------------------------

    def attribute(self, value: Any, path: str) -> Any:
        """What ``self.<path>`` is while tracing: a proxy for tensors, a handle for modules, else the value itself."""
        if isinstance(value, torch.Tensor) or _holds_tensor(value):
            if path not in self._attributes:
                self._attributes[path] = ValueProxy(self.graph.create_node("get_attr", path), self, value)
            return self._attributes[path]
        if isinstance(value, nn.Module):
            return ModuleHandle(self, value, self._module_paths.get(id(value), path))
        if isinstance(value, (list, tuple)) and any(isinstance(v, nn.Module) for v in value):
            return type(value)(self.attribute(v, self._module_paths.get(id(v), f"{path}.{i}")) for i, v in enumerate(value))
        return value

    def real(self, structure: Any) -> Any:
        """The example's values of a nested structure of proxies."""
        if isinstance(structure, ValueProxy):
            return structure.value
        if type(structure) is ModuleHandle:
            return structure._module
        if isinstance(structure, tuple) and hasattr(structure, "_fields"):
            return type(structure)(*(self.real(s) for s in structure))
        if isinstance(structure, (tuple, list)):
            return type(structure)(self.real(s) for s in structure)
        if isinstance(structure, dict):
            return {self.real(k): self.real(v) for k, v in structure.items()}
        if isinstance(structure, slice):
            return slice(self.real(structure.start), self.real(structure.stop), self.real(structure.step))
        return structure

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, ValueProxy):
            return a.node
        if type(a) is ModuleHandle:
            return self.graph.create_node("get_attr", a._path or SELF)
        if isinstance(a, torch.Tensor):
            return self._constant(a)
        if isinstance(a, np.generic):
            return a.item()
        return super().create_arg(a)

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        path = self._paths.get(id(tensor))
        if path is None:
            path = f"harmoq_constant_{sum(1 for n in self.root._buffers if n.startswith('harmoq_constant_'))}"
            self.root.register_buffer(path, tensor.detach().clone(), persistent=False)
            self._paths[id(tensor)] = path
            self._attributes[f"keep {path}"] = tensor
        return self.graph.create_node("get_attr", path)

    # -- nodes -------------------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        """Record one node and compute its value on the example; contractions become calls of their site."""
        op = contraction_op(kind, target)
        if op is not None:
            kind, target, args, kwargs = self._contraction(op, kind, target, args, kwargs)
        node = self.graph.create_node(kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs)))
        value = self._evaluate(kind, target, self.real(tuple(args)), self.real(dict(kwargs)))
        return None if value is None else ValueProxy(node, self, value)

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A library function met in the author's code: a node if a proxy or a model tensor is involved."""
        if function in _INLINED:
            return _INLINED[function](*args, **kwargs)
        if find_tracer((args, kwargs)) is None:
            constant_data = any(isinstance(a, np.ndarray) for a in args)
            if function not in FACTORIES or constant_data:
                return function(*args, **kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def _evaluate(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with activate(None), torch.no_grad():
            if kind == "call_function":
                return target(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return self.root.get_submodule(target)(*args, **kwargs)

    def guard(self, proxy: ValueProxy, question: str) -> Any:
        """Answer Python's question with the example's answer and record the guard."""
        answer = QUESTIONS[question](proxy.value)
        self.graph.create_node("call_function", check_guard, (proxy.node, question, answer), {})
        return answer

    # -- contractions ------------------------------------------------------------------------------------------

    def _contraction(self, op: str, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
        if op == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        if op == "linear":
            bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
            args, kwargs = (bound["input"], bound["weight"], bound.get("bias")), {}
        key, location = self._source_key()
        left = args[1] if op == "baddbmm" else args[0]
        weight = None
        if op == "linear" and isinstance(args[1], ValueProxy) and args[1].node.op == "get_attr":
            weight = str(args[1].node.target)
        contraction = Contraction(
            op=op,
            key=key,
            args=self.real(tuple(args)),
            kwargs=self.real(dict(kwargs)),
            left_is_softmax=_comes_from_softmax(left, self.root),
            depends_on_input=any(_depends_on_input(a.node) for a in args if isinstance(a, ValueProxy)),
            weight=weight,
            location=location,
        )
        self.contractions += 1
        with activate(None):
            site = self.site_factory(self.root, contraction)
        if site is None:
            return kind, target, args, kwargs
        if op == "einsum":  # the site knows its equation
            args = args[1:]
        if op == "linear" and weight is not None:  # ... and its weight
            args = (args[0], args[2])
        return "call_module", site, args, kwargs

    def _source_key(self) -> tuple[SourceKey, str]:
        frame = inspect.currentframe()
        while frame is not None and _is_machinery(frame.f_code.co_filename):
            frame = frame.f_back
        assert frame is not None
        code = frame.f_code
        spot = (code.co_qualname, frame.f_lineno - code.co_firstlineno)
        occurrence = self._occurrences.get(spot, 0)
        self._occurrences[spot] = occurrence + 1
        return SourceKey(*spot, occurrence), f"{code.co_filename}:{frame.f_lineno}"


def trace_island(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], site_factory: SiteFactory) -> Variant:
    """Trace ``root``'s own forward on example arguments.

    Helpers that cannot be followed become one opaque node, one by one, innermost of the author's own first.

    Args:
        root: Module whose forward is traced; its class is the author's, or an island class over it.
        args: Example positional arguments; tensors and numbers become placeholders, everything else is specialised.
        kwargs: Example keyword arguments.
        site_factory: See :class:`IslandTracer`.

    Raises:
        TraceError: The forward cannot be traced; the message names file, line and reason.
    """
    cls = getattr(root, "harmoq_original_class", type(root))
    opaque: list[tuple[dict[str, Any], str]] = []
    for _ in range(_MAX_RESTARTS):
        tracer = IslandTracer(root, site_factory)
        try:
            with torch.no_grad(), traced_globals(cls, opaque):
                _record(tracer, cls, args, kwargs)
            return Variant(
                tracer.graph, compile_graph(tracer.graph, cls), tracer.contractions, tuple(name for _, name in opaque)
            )
        except Exception as error:  # whatever an author's Python raises on a proxy
            helper = _failing_helper(error, cls)
            if helper is None or any(h[0] is helper[0] and h[1] == helper[1] for h in opaque):
                raise TraceError(f"{cls.__name__}.forward cannot be traced", found=_reason(error)) from error
            logger.debug("%s: %s becomes opaque (%s)", cls.__name__, helper[1], _reason(error))
            opaque.append(helper)
    raise TraceError(f"{cls.__name__}.forward cannot be traced", found=f"more than {_MAX_RESTARTS} opaque helpers")


def dynamic_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], list[Any], Any]:
    """Split call arguments into (dynamic leaves, calling pattern, tree); the pattern decides which graph fits."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    dynamic, pattern = [], []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            dynamic.append(leaf)
            pattern.append(("tensor", leaf.dim(), leaf.dtype, leaf.device.type))
        elif type(leaf) in (int, float):
            dynamic.append(leaf)
            pattern.append(type(leaf))
        else:
            pattern.append(leaf if isinstance(leaf, (str, bytes, bool, type(None))) else ("object", id(leaf)))
    return dynamic, pattern, tree


def _record(tracer: IslandTracer, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    inputs: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) or type(leaf) in (int, float):
            node = tracer.graph.create_node("placeholder", f"leaf_{len([i for i in inputs if isinstance(i, ValueProxy)])}")
            value = leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
            inputs.append(ValueProxy(node, tracer, value))
        else:
            inputs.append(leaf)
    proxy_args, proxy_kwargs = pytree.tree_unflatten(inputs, tree)
    handle = ModuleHandle(tracer, tracer.root, "")
    with activate(tracer):
        output = cls.forward(handle, *proxy_args, **proxy_kwargs)  # type: ignore[attr-defined]
    tracer.graph.create_node("output", "output", (tracer.create_arg(output),), {})


def compile_graph(graph: fx.Graph, cls: type) -> Callable[..., Any]:
    """Compile a graph into a function of the live module (visible to tracebacks through linecache)."""
    code = graph.python_code("self")
    filename = f"<island {cls.__name__} {next(_counter)}>"
    scope = dict(code.globals)
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    exec(compile(code.src, filename, "exec"), scope)  # the graph's own generated code
    forward: Callable[..., Any] = scope["forward"]
    return forward


def _failing_helper(error: Exception, cls: type) -> tuple[dict[str, Any], str] | None:
    """The innermost author helper on the way to an error, as (globals, name) of the reference that called it."""
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    home = package_of(cls.__module__)
    author = [f for f in frames if package_of(f.f_globals.get("__name__", "")) == home]
    for caller, callee in reversed(list(zip(author, author[1:], strict=False))):
        for name, value in caller.f_globals.items():
            if getattr(inspect.unwrap(value) if callable(value) else None, "__code__", None) is callee.f_code:
                return caller.f_globals, name
    return None


def _reason(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _is_machinery(filename: str) -> bool:
    return filename.startswith(_MACHINERY) or "/torch/fx/" in filename or filename.endswith("/torch/overrides.py")


_MACHINERY = __file__.rsplit("/", 1)[0]


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())


def _depends_on_input(node: fx.Node) -> bool:
    """Whether a placeholder is among the ancestors of a node."""
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        if current.op == "placeholder":
            return True
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return False


def _comes_from_softmax(operand: Any, root: nn.Module) -> bool:
    """Whether an operand is an attention map: a softmax, perhaps followed by dropout, casts or views."""
    node = operand.node if isinstance(operand, ValueProxy) else None
    for _ in range(8):
        if not isinstance(node, fx.Node):
            return False
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_module":
            name = type(root.get_submodule(str(node.target))).__name__.lower()
        if name == "softmax":
            return True
        if name not in _PASS_THROUGH and name != "rearrange":
            return False
        node = next((a for a in node.args if isinstance(a, fx.Node)), None)
    return False


__all__ = ["IslandTracer", "ModuleHandle", "ValueAttribute", "Variant", "dynamic_leaves", "trace_island"]
