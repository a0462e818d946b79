"""The recorded graph as steps: token-wise operations, fused kernels, and torch's operators for everything else.

Each operator has a handler that returns what it makes, or None where the operands are not what the handler is for; then
torch runs it on values brought into shape (`materialize.py`). No handler changes what is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.cpu_kernels.rowwise import Broadcast, Columns, Op, RowProgram, linear_constants
from harmoq_ao.kernels.ops import linear_operands
from harmoq_ao.programs.attention import lower_attention
from harmoq_ao.programs.attention_matching import Match, match_attention
from harmoq_ao.programs.convolution import ColumnMeans, Convolution, Depthwise, is_depthwise, is_pointwise
from harmoq_ao.programs.indices import MOVEMENTS, Aligned, Index, Roots, compact
from harmoq_ao.programs.materialize import Reordered, TorchOperator
from harmoq_ao.programs.norms import SpelledNorm, match_norm
from harmoq_ao.programs.record import Recorded
from harmoq_ao.programs.steps import Codes, Emit, Known, Matrix, ModuleStep, Read, RowStep, Step, Value, row_level

_aten = torch.ops.aten
_SAME = {_aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.contiguous.default}
_UNARY = {
    _aten.sigmoid.default: Unary.SIGMOID,
    _aten.relu.default: Unary.RELU,
    _aten.silu.default: Unary.SILU,
    _aten.tanh.default: Unary.TANH,
}
_BINARY = {
    _aten.add.Tensor: Binary.ADD,
    _aten.sub.Tensor: Binary.SUB,
    _aten.mul.Tensor: Binary.MUL,
    _aten.add.Scalar: Binary.ADD,
    _aten.sub.Scalar: Binary.SUB,
    _aten.mul.Scalar: Binary.MUL,
    _aten.div.Tensor: Binary.MUL,
    _aten.div.Scalar: Binary.MUL,
}


@dataclass(frozen=True)
class Modules:
    """The modules of a device for steps that are not token-wise.

    Attributes:
        operator: See :class:`TorchOperator`.
        convolution: See :class:`Convolution`.
        reordered: See :class:`Reordered`.
        depthwise: See :class:`Depthwise`.
        means: See :class:`ColumnMeans`.
    """

    operator: type[TorchOperator]
    convolution: Callable[..., nn.Module]
    reordered: Callable[..., nn.Module]
    depthwise: Callable[..., nn.Module]
    means: Callable[..., nn.Module]


class Lowering:
    """One walk over a recorded graph.

    Args:
        recorded: From :func:`record`.
        half: Whether float products run on bfloat16 operands.

    Attributes:
        known: What each node is.
        image: The matrix of the image batch, once it was met.
        images: Size of the batch.
        handlers: What lowers a call, by its operator.
        modules: What computes steps that are not token-wise.
    """

    handlers: ClassVar[dict[Any, Callable[..., Known]]] = {}
    modules: ClassVar[Modules] = Modules(TorchOperator, Convolution, Reordered, Depthwise, ColumnMeans)

    def __init__(self, recorded: Recorded, half: bool) -> None:
        self.recorded, self.half = recorded, half
        self.roots = Roots()
        self.known: dict[fx.Node, Known] = {}
        self.last, self.pixels = _last_contractions(recorded.graph)
        found = (match_attention(node) for node in recorded.graph.nodes)
        self.matches: dict[fx.Node, Match] = {match.values: match for match in found if match is not None}
        self.absorbed = {node for match in self.matches.values() for node in match.absorbed}
        self.image: Matrix | None = None
        self.images = 0
        self.masks: list[tuple[Tensor, Any]] = []

    def run(self) -> Value:
        """Lower every node; the value of the output."""
        for node in self.recorded.graph.nodes:
            if node.op == "placeholder":
                self.known[node] = self.place_value(node.meta["shape"], None)
                self.image, self.images = self.known[node].matrix, node.meta["shape"][0]
            elif node.op == "get_attr":
                constant = self.recorded.constant(node)
                self.known[node] = constant.float() if constant.is_floating_point() else constant
            elif node.op == "output":
                found = self.known[node.args[0]]
                assert isinstance(found, Value)
                return found
            elif node in self.matches:
                self.known[node] = self.attention(node)
            elif node.users and node not in self.absorbed:
                self.known[node] = self.lower(node)
        raise AssertionError("a graph without an output")

    def attention(self, node: fx.Node) -> Known:
        """A whole attention, or its operators one by one where no kernel takes it."""
        match = self.matches[node]
        found = self.matched(match)
        if found is None:
            for inner in match.absorbed:
                self.known[inner] = self.lower(inner)
            found = self.lower(node)
        return found

    def matched(self, match: Match) -> Value | None:
        """The kernel for an attention; None where there is none."""
        return lower_attention(self, match)

    def lower(self, node: fx.Node) -> Known:
        """What a call makes."""
        found_args: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: self.known[n])
        args, kwargs = found_args
        if node.target is operator.getitem:
            return args[0][args[1]]
        handler = self.handlers.get(node.target) if _all_float(node) else None
        found = None
        if node.target in MOVEMENTS and isinstance(args[0], Value):
            found = self.movement(node.target, args, kwargs)
        elif node.target in _SAME and isinstance(args[0], Value):
            found = args[0]
        elif handler is not None:
            found = handler(self, node, *args, **kwargs)
        return self.torch_operator(node, args, kwargs) if found is None else found

    # --- values ---------------------------------------------------------------------------------------------------

    @property
    def rounded_type(self) -> torch.dtype | None:
        """Type of results that may be rounded as operands of products are; None: as of what they are made from."""
        return torch.bfloat16 if self.half else torch.float32

    def place_value(self, shape: tuple[int, ...], step: Step | None) -> Value:
        """A value in torch's own layout: convolutions and images have their channels first."""
        index = self.roots.channels_first(shape) if len(shape) == 4 else self.roots.rows_last(shape or (1,))
        width = shape[1] if len(shape) == 4 else (shape or (1,))[-1]
        return Value(Matrix(index.length, width, step), index)

    def torch_operator(self, node: fx.Node, args: Any, kwargs: Any) -> Known:
        """An operator as torch runs it."""
        module = self.modules.operator(node.target, args, kwargs)
        if "shape" in node.meta:
            return self.module_step(module, module.reads, [(node.meta["shape"], None)])[0]
        # several results, taken by their numbers
        parts: dict[Any, Any] = {user.args[1]: user.meta["shape"] for user in node.users}
        module.parts = tuple(parts)
        values = self.module_step(module, module.reads, [(shape, None) for shape in parts.values()])
        return dict(zip(parts, values, strict=True))

    def module_step(
        self,
        module: nn.Module,
        reads: list[Read],
        results: Sequence[tuple[tuple[int, ...], Index | None]],
        dtype: torch.dtype | None = None,
    ) -> list[Value]:
        """A step that is no chain of token-wise operations; the values that it makes, in float32 by default."""
        level = max([r.matrix.level for r in reads], default=0)
        step = ModuleStep(reads, [], level, module, dtype or torch.float32)
        values = []
        for shape, index in results:
            if index is None:
                value = self.place_value(shape, step)
            else:
                value = Value(Matrix(index.length, shape[-1], step), index)
            step.results.append(value.matrix)
            values.append(value)
        return values

    def row_step(self, rows: int, width: int, reads: list[Read], emit: Emit, codes: bool = False) -> Matrix:
        """A token-wise step; the matrix that it makes, whose entries may be codes."""
        step = RowStep(reads, [], row_level(rows, reads), emit)
        step.results.append(Matrix(rows, width, step, codes))
        return step.results[0]

    # --- movements and single values ------------------------------------------------------------------------------

    def movement(self, target: Any, args: Any, kwargs: Any) -> Known:
        value, rest = args[0], args[1:]
        try:
            moved = value.index.moved(target, rest, kwargs)
        except ValueError:
            return None
        if isinstance(moved, list):
            return [Value(value.matrix, index) for index in moved]
        return Value(value.matrix, moved)

    def elementwise(self, value: Value, keeps_zero: bool, make: Callable[[int], Emit]) -> Known:
        """An operation on every entry by itself; `make` gives its instruction for a number of columns."""
        span = value.index.span()
        if span.padded and not keeps_zero:
            return None
        width = span.last - span.first + 1
        reads = [Read(value.matrix, span.first, width)]
        matrix = self.row_step(value.matrix.rows, width, reads, make(width))
        return Value(matrix, value.index.shifted(span.first))

    def unary(self, value: Any, kind: Unary, slope: float = 0.0) -> Known:
        if not isinstance(value, Value):
            return None

        def make(width: int) -> Emit:
            return lambda p, to, at: p.emit(Op.UNARY, kind, to, at[0], width, p.number(slope))

        return self.elementwise(value, kind not in (Unary.SIGMOID,), make)

    def scalar(self, value: Value, kind: Binary, number: float) -> Known:
        def make(width: int) -> Emit:
            return lambda p, to, at: p.emit(Op.SCALAR, kind, to, at[0], width, p.number(number))

        return self.elementwise(value, kind is Binary.MUL, make)

    # --- two values -----------------------------------------------------------------------------------------------

    def binary(self, node: fx.Node, left: Any, right: Any, **options: Any) -> Known:
        norm = match_norm(node)
        found = None if norm is None else self.spelled_norm(norm)
        if found is not None:
            return found
        target: Any = node.target
        kind = _BINARY[target]
        if options.get("alpha", 1) != 1 or options.get("rounding_mode"):
            return None
        if kind is Binary.MUL and "div" in str(node.target):
            if isinstance(right, Value):
                return None
            right = 1.0 / right
        if isinstance(left, Value) and isinstance(right, (int, float)):
            return self.scalar(left, kind, right)
        if isinstance(left, Value) and isinstance(right, Tensor):
            return self.with_constant(kind, left, right, tuple(node.meta["shape"]))
        if isinstance(right, Value) and isinstance(left, Tensor) and kind is not Binary.SUB:
            return self.with_constant(kind, right, left, tuple(node.meta["shape"]))
        if isinstance(left, Value) and isinstance(right, Value):
            # what is added to may be the sum of all blocks so far; what gates is rounded as operands of products are
            exact = kind is not Binary.MUL or not self.half or node in self.pixels
            return self.two_values(kind, left, right, tuple(node.meta["shape"]), exact)
        return None

    def with_constant(self, kind: Binary, value: Value, constant: Tensor, shape: tuple[int, ...]) -> Known:
        if value.shape != shape or constant.is_complex():
            return None
        if constant.numel() == 1:
            return self.scalar(value, kind, float(constant))
        vector = _column_vector(value.index, constant.expand(shape))
        if vector is None:
            return None
        if kind is Binary.SUB:
            vector = -vector
        return self.affine(value, *((vector, None) if kind is Binary.MUL else (None, vector)))

    def affine(self, value: Value, scale: Tensor | None, shift: Tensor | None) -> Known:
        """``value * scale + shift``, each a number per column from the first one of the value on."""

        def make(width: int) -> Emit:
            return lambda p, to, at: p.emit(Op.AFFINE, to, at[0], width, p.constant(scale), p.constant(shift))

        return self.elementwise(value, shift is None, make)

    def two_values(self, kind: Binary, left: Value, right: Value, shape: tuple[int, ...], exact: bool) -> Known:
        if left.shape != shape or (right.shape == shape and right.matrix.rows > left.matrix.rows):
            if kind is Binary.SUB:
                return None
            left, right = right, left
        if left.shape != shape:
            return None
        spread = right.index if right.shape == shape else right.index.moved(_aten.expand.default, (list(shape),), {})
        met = left.index.aligned(spread)
        span = left.index.span()
        if met is None or ((span.padded or spread.span().padded) and kind is not Binary.MUL):
            return None
        if met.mode is Broadcast.IMAGE and right.matrix.rows != self.images:
            return None  # a row for something else than an image
        matrix = self._combined(kind, left.matrix, right.matrix, span, met, exact)
        return Value(matrix, left.index.shifted(span.first))

    def _combined(self, kind: Binary, left: Matrix, right: Matrix, span: Any, met: Aligned, exact: bool) -> Matrix:
        width = span.last - span.first + 1
        one = met.mode is Broadcast.COLUMN
        reads = [
            Read(left, span.first, width, exact),
            Read(right, met.offset if one else span.first + met.offset, 1 if one else width, exact),
        ]

        def emit(p: RowProgram, to: Columns, at: Any) -> None:
            p.emit(Op.BINARY, kind, to, at[0], at[1], width, met.mode)

        return self.row_step(left.rows, width, reads, emit)

    def cat(self, node: fx.Node, parts: Any, axis: int = 0) -> Known:
        """Values side by side in the same rows."""
        parts = [part for part in parts if part.shape[axis]] or parts
        if not all(isinstance(part, Value) and part.index.rows.numel() for part in parts):
            return None
        channels = [part.index.channels(axis) for part in parts]
        if any(c is None or c.padded for c in channels):
            return None
        if any(
            not torch.equal(c.rows, channels[0].rows) or p.matrix.rows != parts[0].matrix.rows
            for c, p in zip(channels, parts, strict=True)
        ):
            return None
        widths = [part.shape[axis] for part in parts]
        firsts = [channels[0].first + sum(widths[:place]) for place in range(len(parts))]
        if len({part.matrix for part in parts}) == 1 and firsts == [c.first for c in channels]:
            return Value(parts[0].matrix, parts[0].index.widened(axis, sum(widths)).shifted(-firsts[0]))
        reads = [Read(p.matrix, c.first, w) for p, c, w in zip(parts, channels, widths, strict=True)]

        def emit(p: RowProgram, to: Columns, at: Any) -> None:
            first = to.first
            for source, width in zip(at, widths, strict=True):
                p.emit(Op.COPY, Columns(to.slot, first), source, width)
                first += width

        matrix = self.row_step(parts[0].matrix.rows, sum(widths), reads, emit)
        return Value(matrix, parts[0].index.widened(axis, sum(widths)))

    def as_strided(self, node: fx.Node, x: Any, size: Any, stride: Any, offset: Any = None) -> Known:
        """Of one number per channel, as pooling makes them: the value itself."""
        same = isinstance(x, Value) and tuple(size) == tuple(x.shape) == (1, size[1], 1, 1) and stride[1] == 1
        return x if same and not offset else None

    # --- channels -------------------------------------------------------------------------------------------------

    def channel_step(self, value: Value, axis: int, width: int, make: Emit) -> Known:
        """A token-wise operation from all channels along an axis to `width` channels."""
        channels = value.index.channels(axis)
        if channels is None or channels.padded:
            return None
        reads = [Read(value.matrix, channels.first, value.shape[axis])]
        matrix = self.row_step(value.matrix.rows, width, reads, make)
        return Value(matrix, value.index.widened(axis, width))

    def linear(self, node: fx.Node, x: Any, *rest: Any) -> Known:
        *tensors, weight_bits, act_bits, weight_shift, backend = rest
        if not isinstance(x, Value) or tensors[3] is None or backend != "auto":
            return None
        k = x.shape[-1]
        arguments: Any = (*tensors, k, weight_bits, act_bits, weight_shift)
        operands = linear_operands(*arguments)
        n = len(operands.weight)
        constants = linear_constants(operands)

        def emit(p: RowProgram, to: Columns, at: Any) -> None:
            places = [p.constant(c) for c in constants]
            p.emit(Op.LINEAR, to, at[0], k, n, act_bits, *places, *([-1] if len(places) == 5 else []))

        found = self.channel_step(x, -1, n, emit)
        if found is not None and isinstance(found.matrix.step, RowStep):
            found.matrix.step.codes = Codes(constants[0], constants[1], act_bits)
        return found

    def float_linear(self, x: Any, axis: int, weight: Tensor, bias: Tensor | None) -> Known:
        """``x @ weight + bias`` along an axis; weight `[K, N]`."""
        if not isinstance(x, Value):
            return None
        (k, n), matrix = weight.shape, weight.float().contiguous()

        def emit(p: RowProgram, to: Columns, at: Any) -> None:
            p.emit(Op.FLOAT_LINEAR, to, at[0], k, n, p.constant(matrix), p.constant(bias))

        return self.channel_step(x, axis, n, emit)

    def addmm(self, node: fx.Node, bias: Any, x: Any, weight: Any, **options: Any) -> Known:
        plain = not options and isinstance(bias, Tensor) and isinstance(weight, Tensor) and bias.dim() == 1
        return self.float_linear(x, -1, weight, bias) if plain else None

    def mm(self, node: fx.Node, x: Any, weight: Any) -> Known:
        return self.float_linear(x, -1, weight, None) if isinstance(weight, Tensor) else None

    def layer_norm(self, node: fx.Node, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Known:
        if not isinstance(x, Value) or len(shape) != 1 or _users_beyond_first(node):
            return None
        width = shape[0]

        def emit(p: RowProgram, to: Columns, at: Any) -> None:
            p.emit(Op.LAYER_NORM, to, at[0], width, p.constant(weight), p.constant(bias), p.number(eps))

        found = self.channel_step(x, -1, width, emit)
        return None if found is None else [found]

    def spelled_norm(self, norm: SpelledNorm) -> Known:
        x, width = self.known[norm.source], norm.source.meta["shape"][norm.axis]
        if not isinstance(x, Value):
            return None
        factor = None if norm.factor == 1 else torch.full((width,), norm.factor)

        def emit(p: RowProgram, to: Columns, at: Any) -> None:
            p.emit(Op.LAYER_NORM, to, at[0], width, p.constant(factor), p.constant(None), p.number(norm.eps))

        return self.channel_step(x, norm.axis, width, emit)

    def batch_norm(self, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Known:
        trained = len(rest) == 3 and rest[0]
        if not isinstance(x, Value) or trained or _users_beyond_first(node):
            return None
        scale = torch.rsqrt(var.double() + rest[-1])
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        scale, shift = scale.float(), shift.float()
        width = x.shape[1]

        def emit(p: RowProgram, to: Columns, at: Any) -> None:
            p.emit(Op.AFFINE, to, at[0], width, p.constant(scale), p.constant(shift))

        found = self.channel_step(x, 1, width, emit)
        return None if found is None else [found]

    # --- convolutions ---------------------------------------------------------------------------------------------

    def convolution(self, node: fx.Node, x: Any, weight: Any, bias: Any, *geometry: Any) -> Known:
        if not isinstance(x, Value) or not isinstance(weight, Tensor) or weight.dim() != 4:
            return None
        if is_pointwise(weight, geometry):
            return self.float_linear(x, 1, weight.flatten(1).t(), bias)
        if is_depthwise(weight, geometry):
            return self._depthwise(x, weight, bias)
        exact = not self.half or node in self.last or weight.shape[1] <= 4
        module = self.modules.convolution(weight, bias, geometry, tuple(x.shape), exact)
        return self._laid_out(module, x, tuple(node.meta["shape"]), exact)

    def _laid_out(self, module: nn.Module, x: Value, shape: tuple[int, ...], exact: bool) -> Value:
        """A convolution of a value with its channels last in memory."""
        channels = x.index.channels(1)
        if channels is not None and channels.in_order and self.takes_columns(module, channels.first):
            read = Read(x.matrix, channels.first, x.shape[1], exact)
        else:
            x = self.reordered(x, self.roots.channels_first(tuple(x.shape)))
            read = Read(x.matrix, 0, x.matrix.columns, exact)
        return self.module_step(module, [read], [(shape, None)], torch.float32 if exact else torch.bfloat16)[0]

    def takes_columns(self, module: nn.Module, first: int) -> bool:
        """Whether a convolution takes some columns of a matrix, and from now on those from `first` on."""
        return False

    def reordered(self, value: Value, natural: Index) -> Value:
        """The same value as all of a matrix in natural order."""
        channels = value.index.channels(1)
        whole = value.matrix.columns == value.shape[1]
        if whole and channels is not None and channels.in_order and channels.first == 0:
            return Value(value.matrix, natural)
        module = self.modules.reordered(value, natural)
        read = Read(value.matrix, 0, value.matrix.columns)
        (found,) = self.module_step(module, [read], [((value.shape[1],), natural)])
        return found

    def _depthwise(self, x: Value, weight: Tensor, bias: Tensor | None) -> Known:
        channels = x.index.channels(1)
        if channels is None or not channels.in_order:
            return None
        images, width, height, across = x.shape
        module = self.modules.depthwise(weight, bias, channels.first, images, height, across)
        read = Read(x.matrix, channels.first, width, exact=not self.half)
        results = [((width,), self.roots.channels_first(tuple(x.shape)))]
        return self.module_step(module, [read], results, self.rounded_type)[0]

    def mean(self, node: fx.Node, x: Any, axes: Any = None, keepdim: bool = False, **options: Any) -> Known:
        """Mean over all pixels of a value `[B, C, H, W]`."""
        if not isinstance(x, Value) or x.index.rows.dim() != 4 or axes is None or {a % 4 for a in axes} != {2, 3}:
            return None
        channels = x.index.channels(1)
        if channels is None or not channels.in_order:
            return None
        images, width = x.shape[:2]
        module = self.modules.means(channels.first, width, images)
        shape = (images, width, 1, 1)
        index = self.roots.channels_first(shape)
        reads = [Read(x.matrix, channels.first, width, exact=not self.half)]
        (found,) = self.module_step(module, reads, [((width,), index)])
        return found if keepdim else self.movement(_aten.reshape.default, (found, [images, width]), {})


def _all_float(node: fx.Node) -> bool:
    """Whether neither operands nor result of a call are whole numbers, truth values or complex."""
    types = [n.meta["dtype"] for n in (node, *node.all_input_nodes) if "dtype" in n.meta]
    return all(dtype.is_floating_point for dtype in types)


def _column_vector(index: Index, constant: Tensor) -> Tensor | None:
    """A constant as a number per column of the value, from its first column on; None where rows differ."""
    span = index.span()
    vector = torch.zeros(span.last - span.first + 1)
    columns = (compact(index.columns) - span.first).long()
    constant = compact(constant).float()
    one = constant[tuple(slice(0, n) for n in columns.shape)]  # of the entries that have columns of their own
    vector[columns.reshape(-1)] = one.expand(columns.shape).reshape(-1)
    return vector if bool((vector[columns] == constant).all()) else None


def _users_beyond_first(node: fx.Node) -> bool:
    """Whether anything uses another than the first of several results."""
    return any(user.users and user.args[1] != 0 for user in node.users)


def _last_contractions(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
    """Convolutions between which and the output lies no other contraction; and these with all that follows: pixels."""
    found: set[fx.Node] = set()
    todo = [graph.find_nodes(op="output")[0].args[0]]
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target is _aten.convolution.default:
            found.add(node)
        elif "harmoq" not in str(node.target) and "mm" not in str(node.target):
            todo += node.all_input_nodes
    return found, seen


Lowering.handlers = {
    torch.ops.harmoq.linear.default: Lowering.linear,
    _aten.native_layer_norm.default: Lowering.layer_norm,
    _aten.native_batch_norm.default: Lowering.batch_norm,
    _aten._native_batch_norm_legit_no_training.default: Lowering.batch_norm,
    _aten.convolution.default: Lowering.convolution,
    _aten.addmm.default: Lowering.addmm,
    _aten.mm.default: Lowering.mm,
    _aten.mean.dim: Lowering.mean,
    _aten.cat.default: Lowering.cat,
    _aten.as_strided.default: Lowering.as_strided,
    _aten._to_copy.default: lambda lowering, node, x, **options: x if isinstance(x, Value) else None,
    _aten.gelu.default: lambda lowering, node, x, approximate="none": lowering.unary(
        x, Unary.GELU if approximate == "none" else Unary.GELU_TANH
    ),
    _aten.leaky_relu.default: lambda lowering, node, x, slope=0.01: lowering.unary(x, Unary.LEAKY_RELU, slope),
    **{target: (lambda lowering, node, x, kind=kind: lowering.unary(x, kind)) for target, kind in _UNARY.items()},
    **dict.fromkeys(_BINARY, Lowering.binary),
}
