"""What a model computes for images of one size: its operators as one flat graph, recorded without computing them.

The model runs once on stand-ins that know shapes alone (:class:`StandIn`). Whatever does not depend on the image
runs for real at that time and becomes a constant: masks, coordinates, tables of indices. Quantized sites and attention
show themselves as one operator each (`common/tracing.py`).
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.errors import TraceError
from harmoq_ao.common.tracing import recording
from harmoq_ao.programs.indices import compact
from harmoq_ao.programs.views import View

_LARGE = 1 << 16  # values of a constant that is looked for among others
_SAMPLED = 64  # of them, compared first


class Unrecordable(Exception):  # noqa: N818 - an answer, not an error of the user
    """A model's forward depends on values, or writes where a flat graph cannot follow; the message says what."""


@dataclass(frozen=True)
class Recorded:
    """A recorded forward.

    Attributes:
        graph: Its operators; no module yet, as compiling one takes longer than recording it.
        root: Holds the constants.
    """

    graph: fx.Graph
    root: nn.Module

    def constant(self, node: fx.Node) -> Tensor:
        """The constant of a ``get_attr`` node."""
        return self.root.get_buffer(str(node.target))


def record(model: nn.Module, example: Tensor, dtype: torch.dtype = torch.float32) -> Recorded:
    """Record a model's forward.

    Args:
        model: Takes an image batch; returns one tensor.
        example: A batch `[B, C, H, W]` of the size, or anything of its shape and type: its values are not read.
        dtype: Type of the model's float parts; others than float32 run under autocast, as in a quantized model.

    Returns:
        A graph of ATen operators and operators of this project; ``meta["shape"]`` of each node is its result's.

    Raises:
        Unrecordable: The forward asks for values, draws random numbers, writes into tensors, or returns no tensor.
    """
    recorder = _Recorder()
    try:
        # in inference mode operators would show themselves before torch takes them apart
        with torch.inference_mode(False), torch.no_grad(), recording(), _attributes_kept(model):
            image = StandIn(torch.empty_like(example, device="meta", dtype=dtype), recorder)
            recorder.place(image, recorder.graph.placeholder("image"))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float32):
                output = model(image)
    except TraceError as error:
        raise Unrecordable(f"a part of it cannot be traced: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # what torch answers to questions about values
        raise Unrecordable(f"it asks for values: {error}") from error
    if not isinstance(output, Tensor) or id(output) not in recorder.nodes:
        raise Unrecordable(f"it returns a {type(output).__name__} that is not computed from the image")
    recorder.finish(output)
    for node in reversed(recorder.graph.nodes):  # what only answered a question about a shape
        if not node.users and node.op != "output" and node.op != "placeholder":
            recorder.graph.erase_node(node)
    return Recorded(recorder.graph, recorder.root)


def _without_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator is random for its dropout alone, and drops nothing."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    defaults = {a.name: a.default_value for a in func._schema.arguments}
    return (defaults | given).get("dropout_p") == 0


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written into; tensors of inference mode do not tell, and give 0."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward keeps in its modules: it would be a stand-in (``self.mean = self.mean.type_as(x)``)."""
    own = vars(nn.Module()).keys()
    modules = list(model.modules())
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    inner = [d for module in modules for n, d in vars(module).items() if n not in own and type(d) in (dict, list)]
    containers = [(container, container.copy()) for container in inner]
    try:
        yield
    finally:
        for present, before in attributes:
            for name in present.keys() - before.keys():
                del present[name]
            present.update(before)
        for kept, before in buffers:
            for name in [n for n, b in kept.items() if n not in before and isinstance(b, StandIn)]:
                del kept[name]  # others belong to graphs that islands have traced meanwhile
            kept.update(before)
        for container, content in containers:
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)


class StandIn(torch.Tensor):
    """A tensor without values that says it is on the CPU. Operators on it are recorded.

    A subclass and not a dispatch mode: those import the whole compiler when they are first used.

    Args:
        shape: A meta tensor of its shape, strides and type.
        recorder: What records operators on it. It keeps its stand-ins alive, so they refer to it weakly: a cycle
            through tensors may never be collected.
    """

    shape_only: Tensor
    recorder: weakref.ref[_Recorder]

    @staticmethod
    def __new__(cls, shape: Tensor, recorder: _Recorder) -> StandIn:
        made: StandIn = torch.Tensor._make_wrapper_subclass(
            cls,
            shape.shape,
            strides=shape.stride(),
            storage_offset=shape.storage_offset(),
            dtype=shape.dtype,
            device=torch.device("cpu"),
        )
        made.shape_only, made.recorder = shape, weakref.ref(recorder)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        recorder = next(leaf.recorder() for leaf in _tensors((args, kwargs)) if isinstance(leaf, StandIn))
        assert recorder is not None, "a stand-in outlived its recording"
        return recorder.operator(func, args, kwargs or {})


class _Recorder:
    """Records every operator that has a stand-in among its operands."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # so that no other tensor takes an identity
        self._constants: dict[int, fx.Node] = {}
        self._shapes: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[Hashable, Any] = {}
        self._large: dict[Hashable, list[tuple[Tensor, fx.Node]]] = {}
        self._versions: list[tuple[Tensor, int]] = []  # of constants, when they were met
        self._storages: dict[int, set[int]] = {}  # the recorded tensors that lie in each
        self._views: dict[int, View] = {}  # how those that lie in another's memory come from it
        self._stale: set[int] = set()  # those that an operator wrote into by another name

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operator; its result."""
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")
        if torch.Tag.nondeterministic_seeded in func.tags and not _without_dropout(func, args, kwargs):
            raise Unrecordable(f"it draws random numbers: {func}")
        target = self._without_write(func, args) if func._schema.is_mutable else func
        result = self._shapes_of(target, args, kwargs)
        if next(_tensors(result), None) is None:
            return result  # an assertion that held
        result = _mapped(result, lambda shape: StandIn(shape, self))
        node_args, node_kwargs = _mapped(args, self._node), _mapped(kwargs, self._node)
        if target is torch.ops.aten.copy.default and node_args[1].meta.get("dtype") == args[0].dtype:
            node = self._spread(node_args[1], args[0].shape)
        else:
            node = self.graph.call_function(target, node_args, node_kwargs)
        if target is not func:  # the tensor that was written to is the new value from here on
            self._written(args[0], node)
            return args[0]
        self._place_results(result, node)
        if func.is_view:
            parts = [(None, result)] if isinstance(result, Tensor) else enumerate(result)
            self._views.update({id(made): View(args[0], func, args[1:], kwargs, part) for part, made in parts})
        return result

    def finish(self, output: Tensor) -> None:
        """Let a tensor be the graph's result.

        Raises:
            Unrecordable: It, or a constant, was written into by another name.
        """
        self.graph.output(self._node(output))
        if any(version_of(tensor) != version for tensor, version in self._versions):
            raise Unrecordable("it writes into a tensor that it has read, and that does not depend on the image")

    def _shapes_of(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What an operator makes of stand-ins' shapes; asked once for what the blocks of a network have in common."""
        args, kwargs = _mapped(args, self._shape_only), _mapped(kwargs, self._shape_only)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        key = (target, _hashable(args), _hashable(kwargs))
        if key not in self._made:
            result = target(*args, **kwargs)
            memory = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
            made = list(_tensors(result))
            if not made or any(t.untyped_storage()._cdata in memory for t in made):  # views: it is said which memory
                return result
            self._made[key] = result
        return _mapped(
            self._made[key], lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        )

    def _shape_only(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, StandIn):
            return tensor.shape_only
        if tensor.numel() >= _LARGE:  # not kept alive: each block may make its own
            return torch.empty_like(tensor, device="meta")
        known = self._shapes.get(id(tensor))
        if known is None or known[1] is not tensor:
            known = self._shapes[id(tensor)] = (torch.empty_like(tensor, device="meta"), tensor)
        return known[0]

    def _place_results(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self.place(result, node)
            return
        for index, part in enumerate(result):
            if isinstance(part, Tensor):
                self.place(part, self.graph.call_function(operator.getitem, (node, index)))

    def place(self, tensor: Tensor, node: fx.Node) -> None:
        """Let a tensor be the result of a node."""
        storage = self._shape_only(tensor).untyped_storage()._cdata
        if id(tensor) not in self.nodes:
            self._alive.append(tensor)
            self._storages.setdefault(storage, set()).add(id(tensor))
        self._stale.discard(id(tensor))
        self.nodes[id(tensor)] = node
        node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype

    def _without_write(self, func: Any, args: Any) -> Any:
        """The operator that gives what an in-place one writes."""
        name = func._schema.name.split("::")[1]
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
        target: Any = args[0] if args else None
        recorded = isinstance(target, Tensor) and id(target) in self.nodes
        if packet is None or not recorded or func._overloadname not in packet.overloads():
            raise Unrecordable(f"it writes into a tensor: {func}")
        return getattr(packet, func._overloadname)

    def _spread(self, node: fx.Node, shape: torch.Size) -> fx.Node:
        """A node as a tensor of a shape that it is written into."""
        same = node.meta["shape"] == tuple(shape)
        return node if same else self.graph.call_function(torch.ops.aten.expand.default, (node, list(shape)))

    def _written(self, tensor: Tensor, node: fx.Node) -> None:
        """Let a tensor have a new value, and with it those in whose memory it lies; other names are made when read."""
        self._stale |= self._storages[self._shape_only(tensor).untyped_storage()._cdata]
        self.place(tensor, node)
        while (view := self._views.get(id(tensor))) is not None:
            source = view.written(self.graph, self.nodes[id(view.source)], self.nodes[id(tensor)])
            if source is None:
                return
            tensor = view.source
            self.place(tensor, source)

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._stale:
            self._seen_again(tensor)
        known = self.nodes.get(id(tensor)) or self._constants.get(id(tensor)) or self._twin(tensor)
        if known is None:
            name = f"constant_{len(self._constants)}"
            self.root.register_buffer(name, tensor.detach(), persistent=False)
            self._alive.append(tensor)
            self._versions.append((tensor, version_of(tensor)))
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                known = self._constants[id(tensor)] = self.graph.get_attr(name)
            if tensor.numel() >= _LARGE:
                self._large.setdefault(_sample(tensor), []).append((tensor, known))
        return known

    def _seen_again(self, tensor: Tensor) -> None:
        """Make a tensor anew from the one in whose memory it lies, which was written into."""
        view = self._views.get(id(tensor))
        if view is None:
            raise Unrecordable("it reads a tensor that was written into by another name")
        node = self.graph.call_function(view.target, (self._node(view.source), *view.args), view.kwargs)
        alone = view.part is None
        self.place(tensor, node if alone else self.graph.call_function(operator.getitem, (node, view.part)))

    def _twin(self, tensor: Tensor) -> fx.Node | None:
        """A large constant of the same content: authors make the same mask anew in each block."""
        if tensor.numel() >= _LARGE:
            for other, node in self._large.get(_sample(tensor), ()):
                if torch.equal(compact(other), compact(tensor)):
                    return node
        return None


def _sample(tensor: Tensor) -> Hashable:
    """What constants of the same content have in common, and few others: asked before all entries are compared."""
    stored = compact(tensor)
    few = b""
    if stored.is_contiguous():
        sample = stored.flatten()[:: max(1, stored.numel() // _SAMPLED)]
        few = sample.contiguous().view(torch.uint8).numpy().tobytes()
    return tensor.shape, stored.shape, tensor.dtype, few


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors among arguments or results of an operator, which are lists and tuples of plain values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _hashable(value: Any) -> Hashable:
    """Arguments of an operator as a key: of tensors what shapes depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_hashable(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _hashable(item)) for name, item in value.items()])
    return type(value), value


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Arguments of an operator with their tensors changed; several times faster than torch's for any tree."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(item, change) for item in value])
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    return value
