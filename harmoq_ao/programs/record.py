"""What a model computes for images of one size: its operators as one flat graph, recorded without computing them.

The model runs once on stand-ins that know shapes alone (`torch`'s fake tensors). Whatever does not depend on the image
runs for real at that time and becomes a constant: masks, coordinates, tables of indices. Quantized sites and attention
show themselves as one operator each (`common/tracing.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from harmoq_ao.common.tracing import recording

_FUNCTIONAL = {"relu_": "relu", "leaky_relu_": "leaky_relu", "hardtanh_": "hardtanh", "silu_": "silu", "gelu_": "gelu"}


class Unrecordable(Exception):  # noqa: N818 - an answer, not an error of the user
    """A model's forward depends on values, or writes where a flat graph cannot follow; the message says what."""


def record(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Record a model's forward.

    Args:
        model: Takes an image batch; returns one tensor.
        example: A batch `[B, C, H, W]` of the size, or anything of its shape and type: its values are not read.

    Returns:
        A graph of ATen operators and operators of this project; ``meta["shape"]`` of each node is its result's.

    Raises:
        Unrecordable: The forward asks for values, draws random numbers, writes into tensors, or returns no tensor.
    """
    from torch._subclasses.fake_tensor import (  # takes a second: sympy comes with it
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
        UnsupportedFakeTensorException,
    )

    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder()
    try:
        with torch.no_grad(), recording(), _attributes_kept(model):
            image = fakes.from_tensor(example.detach())
            recorder.place(image, recorder.graph.placeholder("image"))
            with recorder:
                output = model(image)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise Unrecordable(f"it asks for values: {error}") from error
    if not isinstance(output, Tensor) or id(output) not in recorder.nodes:
        raise Unrecordable(f"it returns a {type(output).__name__} that is not computed from the image")
    recorder.graph.output(recorder.nodes[id(output)])
    return fx.GraphModule(recorder.root, recorder.graph)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward assigns to its modules: it would be a stand-in (``self.mean = self.mean.type_as(x)``)."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.update(buffers)


class _Recorder(TorchDispatchMode):
    """Records every operator that has a stand-in among its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # so that no other tensor takes an identity
        self._constants: dict[int, fx.Node] = {}
        self._storages: dict[int, int] = {}  # how many recorded tensors lie in each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) and id(leaf) in self.nodes for leaf in leaves):
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unrecordable(f"it draws random numbers: {func}")
        target = self._without_write(func, args) if func._schema.is_mutable else func
        result = target(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result  # a device, or an assertion that held
        node_args, node_kwargs = pytree.tree_map_only(Tensor, self._node, (args, kwargs))
        node = self.graph.call_function(target, node_args, node_kwargs)
        if target is not func:  # the tensor that was written to is the new value from here on
            self.place(args[0], node)
            return args[0]
        self._place_results(result, node)
        return result

    def _place_results(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self.place(result, node)
            return
        for index, part in enumerate(result):
            if isinstance(part, Tensor):
                self.place(part, self.graph.call_function(operator.getitem, (node, index)))

    def place(self, tensor: Tensor, node: fx.Node) -> None:
        """Let a tensor be the result of a node."""
        storage = tensor.untyped_storage()._cdata
        if id(tensor) not in self.nodes:
            self._alive.append(tensor)
            self._storages[storage] = self._storages.get(storage, 0) + 1
        self.nodes[id(tensor)] = node
        node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype

    def _without_write(self, func: Any, args: Any) -> Any:
        """The operator that gives what an in-place one writes, where nobody else sees the memory."""
        name = func._schema.name.split("::")[1]
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
        target = args[0] if args else None
        alone = isinstance(target, Tensor) and self._storages.get(target.untyped_storage()._cdata, 0) == 1
        if packet is None or not alone or func._overloadname not in packet.overloads():
            raise Unrecordable(f"it writes into a tensor: {func}")
        return getattr(packet, func._overloadname)

    def _node(self, tensor: Tensor) -> fx.Node:
        known = self.nodes.get(id(tensor)) or self._constants.get(id(tensor))
        if known is None:
            name = f"constant_{len(self._constants)}"
            self.root.register_buffer(name, tensor.detach(), persistent=False)
            self._alive.append(tensor)
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                known = self._constants[id(tensor)] = self.graph.get_attr(name)
        return known
