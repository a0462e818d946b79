"""One forward of one island to one FX graph, by running it on proxies that carry the example's values.

The module itself is never touched: ``forward`` runs with a :class:`ModuleHandle` in place of ``self``, which hands out
parameters as ``get_attr`` nodes and children as ``call_module`` nodes.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from harmoq_ao.common.errors import TraceError
from harmoq_ao.common.tracing import storage_of
from harmoq_ao.graph.contractions import (
    CONTRACTION_FUNCTIONS,
    Contraction,
    SourceKey,
    contraction_op,
    einsum_letters,
    is_einops_einsum,
)
from harmoq_ao.graph.derived import DerivedBuffers
from harmoq_ao.graph.handles import ModuleHandle
from harmoq_ao.graph.namespaces import FACTORIES, activate, inlined, package_of, plain_type
from harmoq_ao.graph.nodes import SELF, ancestors, calls_site, comes_from_softmax, depends_on_input, writes_by_name
from harmoq_ao.graph.proxies import QUESTIONS, ValueProxy, check_guard, find_tracer, type_name
from harmoq_ao.graph.variant import unchanged

_INLINED = {F.multi_head_attention_forward: inlined(F.multi_head_attention_forward)}

SiteFactory = Callable[[nn.Module, Contraction], str | None]


class IslandTracer(fx.Tracer):
    """Runs one island's forward on proxies and records its graph.

    Args:
        root: The island.
        site_factory: Called at each contraction; returns the attribute of ``root`` holding the site's module, or None
            to leave the call as it is.
        derived: Registers tensors that are not attributes of the root as its buffers.
        opaque: Helpers of the author that become one node.
    """

    def __init__(
        self, root: nn.Module, site_factory: SiteFactory, derived: DerivedBuffers, opaque: frozenset[Any] = frozenset()
    ) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.site_factory = site_factory
        self.derived = derived
        self.opaque = opaque
        self.contractions = 0
        self._attributes: dict[str, Any] = {}
        self._occurrences: dict[tuple[str, int], int] = {}
        self.read: set[str] = set()  # attributes that forward has read, and those it has assigned
        self.assigned: dict[str, Any] = {}
        self.hidden: list[str] = []
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
            if not unchanged(seen, self._plain[path]):
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
            path = self.derived.add_constant(self.root, tensor)
            self._paths[id(tensor)] = path
            self._attributes[f"keep {path}"] = tensor
            self._own = None
        return self.graph.create_node("get_attr", path)

    # -- nodes -------------------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        """Record one node and compute its value on the example; contractions become calls of their site."""
        op = contraction_op(kind, target)
        site = None
        if op is not None:
            site, args, kwargs = self._contraction(op, args, kwargs)
        if site is not None:
            kind, target = "call_module", site
        if isinstance(target, np.ufunc):
            target, args = numpy_function, (target.__name__, *args)
        node = self.graph.create_node(kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs)))
        node.meta["site"] = site is not None
        self._refuse_state(node, args)
        operands = _tensors((args, kwargs))
        versions = [t.value._version for t in operands]
        random = torch.get_rng_state()
        value = self._evaluate(kind, target, self.real(tuple(args)), self.real(dict(kwargs)))
        written = {t.node.name for t, before in zip(operands, versions, strict=True) if t.value._version != before}
        if any(self._is_own(t.value) for t in operands if t.node.name in written):
            raise TraceError("forward writes into its own parameters or buffers", found=str(node.target))
        node.meta["writes"] = tuple(i for i, n in enumerate(node.all_input_nodes) if n.name in written)
        storages = {storage_of(t) for t in _leaves(value) if t.numel()}
        shared = {t.node.name for t in operands if storage_of(t.value) in storages}
        node.meta["shares"] = tuple(i for i, n in enumerate(node.all_input_nodes) if n.name in shared)
        node.meta["random"] = not torch.equal(random, torch.get_rng_state())
        if type(value) is int:
            node.meta["number"] = value
        proxy = None if value is None else ValueProxy(node, self, value)
        self._guard_type(node, value)
        return proxy

    def _guard_type(self, node: fx.Node, value: Any) -> None:
        """Guard what ``is None`` and ``isinstance`` saw, where it may differ in another call: after unknown code."""
        unknown = (node.op == "call_module" and not calls_site(node)) or node.target in self.opaque
        if unknown or (value is None and node.target not in (operator.setitem, setattr)):
            arguments = (node, "type", type_name(value))
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
            self._own = {storage_of(t) for t in own}
        return storage_of(value) in self._own

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A library function met in the author's code: a node if a proxy or a model tensor is involved."""
        if function in _INLINED:
            return _INLINED[function](*args, **kwargs)
        if is_einops_einsum(function) and find_tracer(args) is not None:
            return self.create_proxy("call_function", torch.einsum, (einsum_letters(args[-1]), *args[:-1]), {})
        if find_tracer((args, kwargs)) is None:
            constant_data = any(isinstance(a, np.ndarray) for a in args)
            if function not in FACTORIES or constant_data:
                return function(*args, **kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def _evaluate(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with activate(None), torch.no_grad():
            if kind == "call_function" and (target in self.opaque or _of_library(target)):
                with _Hidden(self.hidden, getattr(target, "__name__", repr(target))):
                    return target(*args, **kwargs)
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

    def _contraction(self, op: str, args: Any, kwargs: Any) -> tuple[str | None, Any, Any]:
        """The site of a contraction and the arguments of its call; without a site, its own arguments, by position."""
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
            left_is_softmax=comes_from_softmax(left.node if isinstance(left, ValueProxy) else None, self.root),
            depends_on_input=any(depends_on_input(a.node) for a in args if isinstance(a, ValueProxy)),
            weight=weight,
            computed_weight=computed,
            location=location,
        )
        self.contractions += 1
        with activate(None):
            site = self.site_factory(self.root, contraction)
        if site is None:
            return None, args, kwargs
        if op == "einsum":  # the site knows its equation
            args = args[1:]
        if op == "linear" and (weight is not None or computed is not None):  # ... and its weight
            args = (args[0], args[2])
        return site, args, kwargs

    def _guard_sizes(self, node: fx.Node) -> bool:
        """Whether a node is computed from parameters and sizes alone; guards pin the sizes then."""
        sizes = []
        for current in ancestors(node, lambda n: "number" in n.meta):
            if current.op == "placeholder":
                return False
            if "number" in current.meta:
                sizes.append(current)
        for size in sizes:
            self.graph.create_node("call_function", check_guard, (size, "int", size.meta["number"]), {})
        return True

    def _source_key(self) -> tuple[SourceKey, str]:
        frame = inspect.currentframe()
        while frame is not None and is_machinery(frame.f_code.co_filename):
            frame = frame.f_back
        assert frame is not None
        code = frame.f_code
        spot = (code.co_qualname, frame.f_lineno - code.co_firstlineno)
        occurrence = self._occurrences.get(spot, 0)
        self._occurrences[spot] = occurrence + 1
        return SourceKey(*spot, occurrence), f"{code.co_filename}:{frame.f_lineno}"


def is_machinery(filename: str) -> bool:
    """Whether a file is the tracer's or torch.fx's own, not the author's."""
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
    """Proxies of tensors in nested arguments; attributes that were not read as values do not count."""
    found = []
    for leaf in pytree.tree_leaves(structure):
        is_tensor = isinstance(leaf, ValueProxy) and isinstance(leaf.value, torch.Tensor)
        if is_tensor and leaf.value.device.type != "meta" and not leaf.value.is_inference():
            found.append(leaf)
    return found


def _of_library(function: Any) -> bool:
    """Whether a function is of another package than torch, such as einops: what it calls in turn becomes no node."""
    return package_of(getattr(function, "__module__", None) or "torch") not in (
        "torch",
        "_operator",
        "builtins",
        "math",
    )


class _Hidden(TorchFunctionMode):
    """Notes the contractions inside a call that is one node: of an opaque helper, or of a library."""

    def __init__(self, found: list[str], helper: str) -> None:
        super().__init__()
        self.found = found
        self.helper = helper

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = CONTRACTION_FUNCTIONS.get(func)
        if op is not None and op != "conv2d":
            self.found.append(f"{self.helper}: {op}")
        return func(*args, **(kwargs or {}))


def numpy_function(name: str, *args: Any, **kwargs: Any) -> Any:
    """A numpy function by name: generated code cannot refer to one itself."""
    return getattr(np, name)(*args, **kwargs)
