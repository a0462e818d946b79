"""A quantized model for images of one size: everything that depends on the size alone is computed once.

Authors build masks, coordinates and index tables in every forward. For one size they are constants: the model is
exported, whatever does not depend on the image is folded, and one flat graph is left, without Python between its
operators. On a GPU that graph is captured as a CUDA graph and replayed with a single launch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.errors import InputError
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.gpu_programs.replay import Replay
from harmoq_ao.sites.model import AuthorModel

_KEPT = 2.0  # a constant may take this many times the memory of what it is made from

_MOVES = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("expand", "view", "reshape", "_unsafe_view", "clone", "permute", "unsqueeze", "squeeze", "alias")
)


class FixedSizeModel(nn.Module):
    """A model for image batches of one shape, type and device.

    Args:
        graph: The folded graph.
        example: A batch it is for.
        cuda_graph: Capture and replay it; only on GPUs.

    Attributes:
        graph: The folded graph, for `torch.compile` and other tools.
    """

    def __init__(self, graph: fx.GraphModule, example: Tensor, cuda_graph: bool) -> None:
        super().__init__()
        self.graph = graph
        self._expected = (example.shape, example.dtype, example.device)
        self._replay = Replay(graph, example) if cuda_graph else None

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Upscale an image batch.

        Raises:
            InputError: Another shape, type or device than the model was made for.
        """
        found = (image.shape, image.dtype, image.device)
        if found != self._expected:
            raise InputError(
                "This model is for images of one size",
                found=_describe(*found),
                expected=_describe(*self._expected),
                remedy="make another with fixed_size, or call the quantized model itself",
            )
        output: Tensor = self.graph(image) if self._replay is None else self._replay(image)
        return output.to(image.dtype)


def fixed_size(quantized: nn.Module, example: Tensor, *, cuda_graph: bool | None = None) -> FixedSizeModel:
    """Specialise a quantized model to one size: on a GPU the graph of its fused kernels, else an export.

    Args:
        quantized: A :class:`QuantizedModel`; left as it is, its weights are shared.
        example: Image batch `[B, C, H, W]` in 0..1 of the shape, type and device to specialise to.
        cuda_graph: Replay a CUDA graph; by default on GPUs.

    Raises:
        InputError: The example is not an image batch for this model.
    """
    fused = quantized.gpu_graph(example) if isinstance(quantized, QuantizedModel) else None
    if fused is not None:
        return FixedSizeModel(fused, example, example.is_cuda if cuda_graph is None else cuda_graph)
    with torch.no_grad():
        quantized(example)  # makes the graphs of islands for this size, which an export cannot
        program = torch.export.export(quantized, (example,), strict=False)
        program = program.run_decompositions({})  # makes autocast's conversions explicit: one flat graph
    module = program.module(check_guards=False)
    fold_constants(module)
    return FixedSizeModel(module, example, example.is_cuda if cuda_graph is None else cuda_graph)


class SingleInput(nn.Module):
    """A model with one argument, named ``image``: exporters take input names and shapes from the signature."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.model.image(image) if isinstance(self.model, AuthorModel) else self.model(image)
        return result


def float32_copy(quantized: QuantizedModel) -> QuantizedModel:
    """A copy for exporters, in float32. Parameters keep the values they were rounded to for storage."""
    twin = copy.deepcopy(quantized)
    return twin if twin.float_dtype is torch.float32 else twin.set_float_dtype(torch.float32)


@torch.no_grad()
def fold_constants(module: fx.GraphModule, keep: Collection[Any] = (), growth: float | None = None) -> int:
    """Compute once, in place, what does not depend on the input; returns the number of removed operators.

    Args:
        module: The graph.
        keep: Operators (overloads) to leave in the graph, with what follows from them.
        growth: What takes more than this many times the memory of what it is computed from stays in the graph as well;
            by default only views that do (an expanded mask).
    """
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = attrgetter(str(node.target))(module)
        elif (
            node.op == "call_function"
            and node.target not in keep
            and _pure(node)
            and all(n in values for n in node.all_input_nodes)
        ):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    before = len(module.graph.nodes)
    computed: set[fx.Node] = set()  # constants that are not worth storing: what they are made from is stored
    for node in reversed(values):
        value = values[node]
        used = any(user not in values or user in computed for user in node.users)
        if node.op == "get_attr" or not used or not isinstance(value, Tensor):
            continue
        if not _worth(node, value, values, growth):
            computed.add(node)
            continue
        name = f"harmoq_constant_{node.name}"
        module.register_buffer(name, value.contiguous(), persistent=False)
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
    for node in reversed(values):  # assertions about constants among them, which have held
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return before - len(module.graph.nodes)


def _pure(node: fx.Node) -> bool:
    """Whether a call gives the same result each time, and changes nothing."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]


def _worth(node: fx.Node, value: Tensor, values: dict[fx.Node, Any], growth: float | None) -> bool:
    """Whether a constant is worth storing: it does not take much more memory than what it is computed from."""
    sources = [n for n in node.all_input_nodes if isinstance(values[n], Tensor)]
    if growth is not None:
        return _bytes(value) <= growth * max(1, sum(_bytes(values[_moved(n, values)]) for n in sources))
    storages = [values[n].untyped_storage() for n in sources]
    views = any(storage.data_ptr() == value.untyped_storage().data_ptr() for storage in storages)
    return not views or _bytes(value) <= _KEPT * max(1, sum(storage.nbytes() for storage in storages))


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _moved(node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """The node whose values a node only repeats or lays out anew; the smallest on the way."""
    smallest = node
    while node.target in _MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        smallest = node if _bytes(values[node]) <= _bytes(values[smallest]) else smallest
    return smallest


def _describe(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype} {tuple(shape)} on {device}"
