"""One forward of one island to one FX graph, by running it on proxies that carry the example's values.

The module itself is never touched: ``forward`` runs with a :class:`ModuleHandle` in place of ``self``, which hands out
parameters as ``get_attr`` nodes and children as ``call_module`` nodes. The graph's code is compiled into a function of
the live module, so that moved, swapped or deleted parameters are always the current ones.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
import logging
import operator
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from harmoq_ao.common.errors import TraceError
from harmoq_ao.graph.contractions import (
    CONTRACTION_FUNCTIONS,
    Contraction,
    SourceKey,
    callable_name,
    contraction_op,
)
from harmoq_ao.graph.namespaces import (
    FACTORIES,
    activate,
    inlined,
    package_of,
    plain_type,
    traced_globals,
)
from harmoq_ao.graph.proxies import QUESTIONS, ValueAttribute, ValueProxy, check_guard, find_tracer

logger = logging.getLogger(__name__)

#: Attribute under which an island offers itself, so that an opaque method call has a node for ``self``.
SELF = "harmoq_self"
_INLINED = {F.multi_head_attention_forward: inlined(F.multi_head_attention_forward)}
_PASS_THROUGH = {"dropout", "to", "type_as", "contiguous", "float", "half", "identity", "reshape", "view", "type"}
#: Attention in one call, which torch takes in evaluation mode without gradients where query, key and value are one.
_FUSED = frozenset({"_native_multi_head_attention", "_transformer_encoder_layer_fwd"})
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
        hidden: Contractions inside opaque nodes, as ``helper: operation``; they stay float.
        reads: Plain attributes of the island that its forward read, with the values the graph was specialised to.
        restartable: No guard comes after a write into a tensor, so that a run that ends in :class:`GuardFailed` has
            left its arguments as they were.
    """

    graph: fx.Graph
    run: Callable[..., Any]
    contractions: int
    opaque: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    reads: tuple[tuple[str, Any], ...] = ()
    restartable: bool = True

    def fits(self, module: nn.Module) -> bool:
        """Whether the plain attributes of the live module are still those the graph was specialised to."""
        return all(_unchanged(read_attribute(module, path), value) for path, value in self.reads)

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        return self  # immutable: the module is an argument of ``run``


@dataclass(frozen=True, eq=False)
class Unknown:
    """An argument of a call that is compared by identity; held, so that its identity is not given to another object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unknown:
        return self


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
        self.hidden: list[str] = []
        self.opaque: frozenset[Any] = frozenset()
        self._plain: dict[str, Any] = {}  # plain attributes read, as they were
        self._copied: dict[str, Any] = {}  # the copies of containers that forward got to see
        self._own: set[int] | None = None
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
            paths = [self._module_paths.get(id(v), f"{path}.{i}") for i, v in enumerate(value)]
            return type(value)(self.attribute(v, p) for v, p in zip(value, paths, strict=True))
        return self._plain_attribute(value, path)

    def _plain_attribute(self, value: Any, path: str) -> Any:
        """A plain value, which the graph is specialised to; of a container a copy, so that a write is noticed."""
        if isinstance(value, (list, dict, set)):
            if path not in self._copied:
                self._plain[path] = copy.copy(value)
                self._copied[path] = copy.copy(value)
            return self._copied[path]
        if not callable(value):
            self._plain.setdefault(path, value)
        return value

    def plain_reads(self) -> tuple[tuple[str, Any], ...]:
        """Plain attributes that forward read.

        Raises:
            TraceError: forward wrote into one of them.
        """
        for path, seen in self._copied.items():
            if not _unchanged(seen, self._plain[path]):
                raise TraceError(f"forward keeps state in self.{path}", remedy="leave this module float, by a rule")
        return tuple((path, value) for path, value in self._plain.items() if path not in self.assigned)

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
        return plain_type(structure)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, ValueProxy):
            return a.node
        if type(a) is ModuleHandle:
            return self.graph.create_node("get_attr", a._path or SELF)
        if isinstance(a, torch.Tensor):
            return self._constant(a)
        if isinstance(a, np.generic):
            return a.item()
        a = plain_type(a)
        return super().create_arg(a)

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        path = self._paths.get(id(tensor))
        if path is None:
            path = f"harmoq_constant_{sum(1 for n in self.root._buffers if n.startswith('harmoq_constant_'))}"
            self.root.register_buffer(path, tensor.detach().clone(), persistent=False)
            self._paths[id(tensor)] = path
            self._attributes[f"keep {path}"] = tensor
            self._own = None
        return self.graph.create_node("get_attr", path)

    # -- nodes -------------------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        """Record one node and compute its value on the example; contractions become calls of their site."""
        op = contraction_op(kind, target)
        if op is not None:
            kind, target, args, kwargs = self._contraction(op, kind, target, args, kwargs)
        if isinstance(target, np.ufunc):
            target, args = numpy_function, (target.__name__, *args)
        node = self.graph.create_node(kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs)))
        self._refuse_state(node, args)
        operands = _tensors((args, kwargs))
        versions = [t.value._version for t in operands]
        random = torch.get_rng_state()
        value = self._evaluate(kind, target, self.real(tuple(args)), self.real(dict(kwargs)))
        written = {t.node.name for t, before in zip(operands, versions, strict=True) if t.value._version != before}
        if any(self._is_own(t.value) for t in operands if t.node.name in written):
            raise TraceError("forward writes into its own parameters or buffers", found=str(node.target))
        node.meta["writes"] = tuple(i for i, n in enumerate(node.all_input_nodes) if n.name in written)
        storages = {t.untyped_storage().data_ptr() for t in _leaves(value) if t.numel()}
        shared = {t.node.name for t in operands if t.value.untyped_storage().data_ptr() in storages}
        node.meta["shares"] = tuple(i for i, n in enumerate(node.all_input_nodes) if n.name in shared)
        node.meta["random"] = not torch.equal(random, torch.get_rng_state())
        if type(value) is int:
            node.meta["number"] = value
        proxy = None if value is None else ValueProxy(node, self, value)
        self._guard_type(node, kind, target, value)
        return proxy

    def _guard_type(self, node: fx.Node, kind: str, target: Any, value: Any) -> None:
        """Guard what ``is None`` and ``isinstance`` saw, where it may differ in another call: after unknown code."""
        unknown = (kind == "call_module" and op_of_site(target) is None) or target in self.opaque
        if unknown or (value is None and target not in (operator.setitem, setattr)):
            arguments = (node, "type", type(value).__name__)
            self.graph.create_node("call_function", check_guard, arguments, {})

    def _refuse_state(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """A write into what belongs to the module is state; found before it happens, where the name tells."""
        if not args or not writes_by_name(node):
            return
        target = args[0]
        if isinstance(target, ValueProxy) and isinstance(target.value, torch.Tensor):
            own = self._is_own(target.value)
        else:  # a container of the module, or a tensor that became its constant
            own = isinstance(target, torch.Tensor) or (isinstance(target, ValueProxy) and target.node.op == "get_attr")
        if own:
            raise TraceError("forward writes into its own parameters or buffers", found=str(node.target))

    def _is_own(self, value: torch.Tensor) -> bool:
        """Whether a tensor shares memory with a parameter or buffer of the island."""
        if value.numel() == 0 or value.device.type == "meta":
            return False
        if self._own is None:
            own = [t for _, t in _named_tensors(self.root) if t.device.type != "meta"]
            self._own = {t.untyped_storage().data_ptr() for t in own}
        return value.untyped_storage().data_ptr() in self._own

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
            if kind == "call_function" and target in self.opaque:
                with _Hidden(self.hidden, callable_name(target)):
                    return target(*args, **kwargs)
            if kind == "call_function":
                if getattr(target, "__name__", "") in _FUSED:
                    self.hidden.append(f"{target.__name__}: fused attention")
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
        weight, computed = None, None
        if op == "linear" and isinstance(args[1], ValueProxy):
            if args[1].node.op == "get_attr":
                weight = str(args[1].node.target)
            elif self._guard_sizes(args[1].node):
                computed = args[1].value
        contraction = Contraction(
            op=op,
            key=key,
            args=self.real(tuple(args)),
            kwargs=self.real(dict(kwargs)),
            left_is_softmax=_comes_from_softmax(left, self.root),
            depends_on_input=any(_depends_on_input(a.node) for a in args if isinstance(a, ValueProxy)),
            weight=weight,
            computed_weight=computed,
            location=location,
        )
        self.contractions += 1
        with activate(None):
            site = self.site_factory(self.root, contraction)
        if site is None:
            return kind, target, args, kwargs
        if op == "einsum":  # the site knows its equation
            args = args[1:]
        if op == "linear" and (weight is not None or computed is not None):  # ... and its weight
            args = (args[0], args[2])
        return "call_module", site, args, kwargs

    def _guard_sizes(self, node: fx.Node) -> bool:
        """Whether a node is computed from parameters and sizes alone; guards pin the sizes then."""
        todo, seen, sizes = [node], {node}, []
        while todo:
            current = todo.pop()
            if current.op == "placeholder":
                return False
            if "number" in current.meta:
                sizes.append(current)
                continue
            fresh = [n for n in current.all_input_nodes if n not in seen]
            seen.update(fresh)
            todo.extend(fresh)
        for size in sizes:
            self.graph.create_node("call_function", check_guard, (size, "int", size.meta["number"]), {})
        return True

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
        tracer.opaque = frozenset(namespace[name] for namespace, name in opaque)
        try:
            with torch.no_grad(), traced_globals(cls, opaque):
                _record(tracer, cls, args, kwargs)
            return Variant(
                tracer.graph,
                compile_graph(tracer.graph, cls),
                tracer.contractions,
                tuple(name for _, name in opaque),
                tuple(dict.fromkeys(tracer.hidden)),
                tracer.plain_reads(),
                _is_restartable(tracer.graph),
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
    dynamic: list[Any] = []
    pattern: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            twin = next(i for i, other in enumerate(leaves) if other is leaf)  # forward may ask ``query is key``
            dynamic.append(leaf)
            pattern.append(("tensor", leaf.dim(), leaf.dtype, leaf.device.type, twin))
        elif type(leaf) in (int, float):
            dynamic.append(leaf)
            pattern.append(type(leaf))
        else:
            pattern.append((type(leaf), leaf) if isinstance(leaf, _BY_VALUE) else Unknown(leaf))
    return dynamic, pattern, tree


#: Immutable arguments that a graph may be specialised to. Modules and callables count too, by identity.
_BY_VALUE = (str, bytes, bool, complex, type(None), torch.Size, torch.dtype, torch.device, np.generic, range)


def _specialisable(leaf: Any) -> bool:
    return isinstance(leaf, (*_BY_VALUE, nn.Module, type)) or callable(leaf)


def _record(tracer: IslandTracer, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    inputs: list[Any] = []
    known: dict[int, ValueProxy] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) or type(leaf) in (int, float):
            node = tracer.graph.create_node("placeholder", f"leaf_{sum(isinstance(i, ValueProxy) for i in inputs)}")
            if isinstance(leaf, torch.Tensor):
                inputs.append(known.setdefault(id(leaf), ValueProxy(node, tracer, leaf.detach().clone())))
            else:
                inputs.append(ValueProxy(node, tracer, leaf))
        elif _specialisable(leaf):
            inputs.append(leaf)
        else:
            raise TraceError("An argument may change without notice", found=f"a {type(leaf).__name__}")
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
    for caller, callee in reversed(list(itertools.pairwise(author))):
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


def _leaves(value: Any) -> list[torch.Tensor]:
    """Tensors that own memory in a nested value."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.device.type != "meta"]


def _tensors(structure: Any) -> list[ValueProxy]:
    """Proxies of tensors in nested arguments; attributes that were not read as values are none."""
    found = []
    for leaf in pytree.tree_leaves(structure):
        is_tensor = isinstance(leaf, ValueProxy) and isinstance(leaf.value, torch.Tensor)
        if is_tensor and leaf.value.device.type != "meta" and not leaf.value.is_inference():
            found.append(leaf)
    return found


def read_attribute(module: nn.Module, path: str) -> Any:
    """``module.<path>`` as it is now; a missing one is none of the values a graph can be specialised to."""
    value: Any = module
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, (list, tuple)) else getattr(value, part)
        except (AttributeError, IndexError, ValueError):
            return _MISSING
    return value


_MISSING = object()


def _unchanged(now: Any, before: Any) -> bool:
    """Equality of plain values by content, of everything else by identity."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(_unchanged(a, b) for a, b in zip(now, before, strict=True))
    if isinstance(now, dict):
        return list(now) == list(before) and all(_unchanged(now[k], before[k]) for k in now)
    if isinstance(now, (int, float, *_BY_VALUE, set, slice)):
        return bool(now == before or (now != now and before != before))
    return False


def _is_restartable(graph: fx.Graph) -> bool:
    guards = [i for i, n in enumerate(graph.nodes) if n.target is check_guard]
    writes = [i for i, n in enumerate(graph.nodes) if n.meta.get("writes")]
    return not guards or not writes or writes[0] > guards[-1]


def numpy_function(name: str, *args: Any, **kwargs: Any) -> Any:
    """A numpy function by name: generated code cannot refer to one itself."""
    return getattr(np, name)(*args, **kwargs)


def op_of_site(target: Any) -> str | None:
    """Name of a site's attribute if a ``call_module`` target is one."""
    name = str(target).rpartition(".")[2]
    return name if name.startswith("harmoq_") else None


def writes_by_name(node: fx.Node) -> bool:
    """Whether the name of a node's target says that it writes into its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _INPLACE_OPERATORS or name in {f"__{n}__" for n in _INPLACE_OPERATORS}:
        return True
    if node.op == "call_method" and name in _CONTAINER_WRITES:
        return True
    if node.op == "call_module":
        return False
    return (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))


_INPLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem"})
_CONTAINER_WRITES = frozenset(
    {"append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
)


class _Hidden(TorchFunctionMode):
    """Notes the contractions inside an opaque helper."""

    def __init__(self, found: list[str], helper: str) -> None:
        super().__init__()
        self.found = found
        self.helper = helper

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = CONTRACTION_FUNCTIONS.get(func)
        if op is not None and op != "conv2d":
            self.found.append(f"{self.helper}: {op}")
        return func(*args, **(kwargs or {}))


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
