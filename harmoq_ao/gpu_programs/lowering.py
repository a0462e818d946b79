"""A recorded forward as steps for a GPU: the walk of `programs/lower.py` with the kernels of a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.errors import KernelError
from harmoq_ao.cpu_kernels.rowwise import Columns, Op, RowProgram
from harmoq_ao.gpu_programs.kernels import AttentionCore, ChannelAttention, Linear, Windows
from harmoq_ao.gpu_programs.layout import Operator, Reordered
from harmoq_ao.gpu_programs.operands import AttentionSpec, Operands, Packed, Site, Table
from harmoq_ao.gpu_programs.torch_steps import Contraction, Convolution, Depthwise, FloatLinear, Means
from harmoq_ao.kernels.ops import linear_operands, matmul_contraction
from harmoq_ao.programs.attention_matching import Match, resolved, scaled
from harmoq_ao.programs.channel_attention import find_channel_attention, normalized
from harmoq_ao.programs.found_attention import Attention, find_attention
from harmoq_ao.programs.lower import Lowering, Modules
from harmoq_ao.programs.masks import Mask
from harmoq_ao.programs.record import Recorded
from harmoq_ao.programs.steps import Emit, Known, Matrix, ModuleStep, Read, RowStep, Value
from harmoq_ao.triton_kernels.attention_operands import APART, MAX_KEYS, MAX_TOKENS, MatmulQuantizers
from harmoq_ao.triton_kernels.channel_attention import pack_channels
from harmoq_ao.triton_kernels.rowwise import NARROW

_COSINE_EPS = 1e-12


class GpuLowering(Lowering):
    """One walk over a recorded graph.

    Args:
        recorded: From :func:`record`, in float32.
        dtype: Type of tokens in memory; what has the channels of an image is float32.
        operands: Of the model.

    Attributes:
        missed: Attentions that no kernel takes: the sites of their products, and why.
    """

    modules = Modules(Operator, Convolution, Reordered, Depthwise, Means)

    def __init__(self, recorded: Recorded, dtype: torch.dtype, operands: Operands) -> None:
        super().__init__(recorded, half=True)
        self.dtype, self.operands = dtype, operands
        self.missed: list[tuple[tuple[int, ...], str]] = []
        self._types: dict[Matrix, torch.dtype] = {}
        self._tables: list[Table] = []

    # --- types --------------------------------------------------------------------------------------------------------

    def type_of(self, matrix: Matrix) -> torch.dtype:
        """Type of a matrix in memory."""
        return torch.float32 if matrix.step is None else self._types[matrix]

    def _widest(self, reads: list[Read]) -> torch.dtype:
        """The type of what is made from these: pixels stay float32."""
        types = {self.type_of(read.matrix) for read in reads} - {self.dtype}
        return torch.float32 if torch.float32 in types else self.dtype

    @property
    def rounded_type(self) -> torch.dtype | None:
        """As of what they are made from."""
        return None

    def module_step(self, module: nn.Module, reads: Any, results: Any, dtype: torch.dtype | None = None) -> list[Value]:
        """A step of another kind; its results have the widest type among what it reads, unless one is given."""
        dtype = self._widest(reads) if dtype is None else dtype
        if isinstance(module, Operator):
            module.dtype = dtype
        elif isinstance(module, Contraction):
            module.out_dtype = dtype
        values = super().module_step(module, reads, results, dtype)
        self._types.update({value.matrix: dtype for value in values})
        return values

    def row_step(self, rows: int, width: int, reads: list[Read], emit: Emit, codes: bool = False) -> Matrix:
        """A token-wise step."""
        matrix = super().row_step(rows, width, reads, emit, codes)
        self._types[matrix] = self._widest(reads)
        return matrix

    # --- linears and convolutions -------------------------------------------------------------------------------------

    def linear(self, node: fx.Node, x: Any, *rest: Any) -> Known:
        *tensors, weight_bits, act_bits, weight_shift, backend = rest
        if not isinstance(x, Value) or backend == "reference":
            return None
        arguments: Any = (*tensors, x.shape[-1], weight_bits, act_bits, weight_shift)
        site = Site(linear_operands(*arguments), tensors[0], weight_bits)
        channels = x.index.channels(-1)
        if channels is None or channels.padded:
            return None
        try:
            module = Linear(site, self.operands, channels.first, self.dtype)
        except KernelError:
            return None
        return self._of_channels(module, x, -1, module.width)

    def _of_channels(self, module: nn.Module, x: Value, axis: int, width: int) -> Known:
        """A step from the channels of a value to `width` others of the same token."""
        channels = x.index.channels(axis)
        if channels is None or channels.padded:
            return None
        read = Read(x.matrix, channels.first, x.shape[axis])
        natural = self.roots.rows_last((x.matrix.rows, width))
        (made,) = self.module_step(module, [read], [((width,), natural)], self.dtype)
        return Value(made.matrix, x.index.widened(axis, width))

    def float_linear(self, x: Any, axis: int, weight: Tensor, bias: Tensor | None) -> Known:
        if not isinstance(x, Value):
            return None
        if min(weight.shape) <= NARROW:
            return super().float_linear(x, axis, weight, bias)
        channels = x.index.channels(axis)
        if channels is None:
            return None
        module = FloatLinear(weight, bias, channels.first, self.dtype)
        return self._of_channels(module, x, axis, weight.shape[1])

    def convolution(self, node: fx.Node, x: Any, weight: Any, bias: Any, *geometry: Any) -> Known:
        found = super().convolution(node, x, weight, bias, *geometry)
        step = None if found is None else found.matrix.step
        if not isinstance(step, ModuleStep) or not isinstance(step.module, Convolution):
            return found
        # what becomes pixels without another contraction is not rounded to 16 bits
        dtype = torch.float32 if node in self.last else self.dtype
        step.module.out_dtype = step.dtype = self._types[found.matrix] = dtype
        return found

    def takes_columns(self, module: nn.Module, first: int) -> bool:
        if not isinstance(module, Convolution) or not module.ours:
            return False
        module.first = first
        return True

    # --- attention ----------------------------------------------------------------------------------------------------

    def matched(self, match: Match) -> Value | None:
        """The kernel for an attention; None, with the reason in `missed`, where there is none."""
        try:
            return self._channels(match) or self._windows(match)
        except KernelError as error:
            self.missed.append((_keys(self, match), str(error)))
            return None

    def _channels(self, match: Match) -> Value | None:
        found = find_channel_attention(self, match)
        if found is None:
            return None
        parts, width = (found.q, found.k, found.v), found.v.heads * found.v.width
        quantizers, relative = found.quantizers, found.quantizers is not None and found.quantizers.relative
        acts = None if quantizers is None else (quantizers.query, quantizers.key, quantizers.map, quantizers.value)
        packed = Packed(pack_channels(found.v.heads, found.v.width, found.factor, found.eps, acts, relative))
        firsts = (found.q.first, found.k.first, found.v.first)
        module = ChannelAttention(packed, self.images, firsts, self.dtype, _keys(self, match))
        matrices = (found.query, found.key, found.value.matrix)
        reads = [Read(m, p.first, width) for m, p in zip(matrices, parts, strict=True)]
        rows = self.roots.rows_last((found.value.matrix.rows, width))
        (made,) = self.module_step(module, reads, [((width,), rows)], self.dtype)
        return Value(made.matrix, found.index)

    def _windows(self, match: Match) -> Value:
        found, cosine = self._found(match)
        if found.bias is not None and found.bias.abs().max() == 0:
            found = replace(found, bias=None)
        windows = self._placed(found)
        quantizers = self._quantizers(found)
        after = found.q_factor == 1 or cosine
        scale = found.factor if after else torch.full((found.q.heads,), found.q_factor)
        if not after and not bool((found.factor == 1).all()):
            if quantizers is not None:
                raise KernelError("Both the queries and the scores are scaled", expected="one factor")
            scale = scale * found.factor
        spec = AttentionSpec(
            found.q.heads,
            found.q.width,
            scale.float().contiguous(),
            found.bias,
            cosine,
            after,
            quantizers,
            APART if found.mask is None else int(found.mask.value),
            _keys(self, match),
        )
        firsts = (found.q.first, found.k.first, found.v.first)
        module = AttentionCore(spec, self.operands.attention(spec), windows, firsts)
        results = [((found.width,), found.index)]
        return self.module_step(module, found.reads(exact=False), results, self.dtype)[0]

    def _found(self, match: Match) -> tuple[Attention, bool]:
        """The attention, and whether its scores are cosines."""
        query, key = normalized(self, match.query), normalized(self, match.key)
        if query is not None and key is not None and {query[2], key[2]} == {_COSINE_EPS}:
            sides: list[Any] = [Value(*query[:2]), Value(*key[:2]), self.known.get(match.value)]
            found = find_attention(self, match, sides, 1.0)
            if found is not None:
                return found, True
        query_node, q_factor = scaled(self.known, match.query)
        operands: list[Any] = [self.known.get(node) for node in (query_node, match.key, match.value)]
        plain = find_attention(self, match, operands, q_factor)
        if plain is None:
            raise KernelError(
                "Its operands are no heads of windows, or more happens to its scores than a bias and a mask"
            )
        return plain, False

    def _placed(self, found: Attention) -> Windows:
        """Indices of the windows, and regions that are masked."""
        length = found.query.matrix.rows // self.images
        tokens, keys = found.q.rows.shape[1], found.k.rows.shape[1]
        if tokens > MAX_TOKENS or keys > MAX_KEYS:
            raise KernelError("Its windows are too large", found=(tokens, keys), expected=(MAX_TOKENS, MAX_KEYS))
        index = _of_image(found.q.rows, self.images, length)
        if index.numel() != length or bool((index < 0).any()):
            raise KernelError("Its windows do not cover the image")
        key_index = None
        if not torch.equal(found.q.rows, found.k.rows) or found.key.matrix.rows != found.query.matrix.rows:
            key_index = self._table(_of_image(found.k.rows, self.images, found.key.matrix.rows // self.images))
        return Windows(self.images, self._table(index), key_index, self._regions(found.mask, len(index)))

    def _regions(self, mask: Mask | None, windows: int) -> Table | None:
        if mask is None:
            return None
        if mask.regions is None or mask.value != int(mask.value) or mask.value > -50:
            raise KernelError("Its mask is none of regions", found=mask.value, expected="a whole number, -50 or less")
        regions = mask.regions
        if len(regions) != windows:
            if len(regions) % windows or not bool(
                (regions.reshape(-1, *regions[:windows].shape) == regions[:windows]).all()
            ):
                raise KernelError("Its mask differs from image to image")
            regions = regions[:windows]
        return self._table(regions.to(torch.uint8))

    def _table(self, tensor: Tensor) -> Table:
        """One table for all of the same content."""
        for known in self._tables:
            kept = known.tensor
            if kept.dtype == tensor.dtype and kept.shape == tensor.shape and torch.equal(kept, tensor):
                return known
        self._tables.append(Table(tensor.contiguous()))
        return self._tables[-1]

    @staticmethod
    def _quantizers(found: Attention) -> MatmulQuantizers | None:
        if found.scores is None or found.products is None:
            return None
        left, right = matmul_contraction(*found.scores[:5]), matmul_contraction(*found.products[:5])
        return MatmulQuantizers(*left, *right, found.relative)


def _keys(lowering: GpuLowering, match: Match) -> tuple[int, ...]:
    """What tells the sites of an attention's quantized products: where the first range of each lies."""
    both = (resolved(lowering.known, arguments) for arguments in (match.scores, match.products))
    return tuple(own[0].data_ptr() for own in both if own is not None and isinstance(own[0], Tensor))


def _of_image(rows: Tensor, images: int, length: int) -> Tensor:
    """Rows `[images * nW, N]` of a matrix as rows `[nW, N]` of an image; -1 stays.

    Raises:
        KernelError: Images differ.
    """
    if len(rows) % images:
        raise KernelError("Its windows reach over images")
    parts = rows.reshape(images, -1, rows.shape[1])
    first = parts[0]
    starts = torch.arange(images, dtype=rows.dtype).reshape(-1, 1, 1) * length
    if bool((first >= length).any()) or not torch.equal(parts, torch.where(first < 0, first, first + starts)):
        raise KernelError("Its windows differ from image to image")
    return first.to(torch.int32)


def instructions(step: RowStep) -> list[tuple[Op, list[int], RowProgram]]:
    """The instructions of a token-wise step; slots are its reads in order, then its result."""
    program = RowProgram(len(step.reads), [(step.results[0].columns, torch.float32)])
    step.emit(program, Columns(len(step.reads)), [Columns(slot) for slot in range(len(step.reads))])
    found, at = [], 0
    while at < len(program.code):
        found.append((Op(program.code[at]), program.code[at + 2 : at + 2 + program.code[at + 1]], program))
        at += 2 + program.code[at + 1]
    return found


GpuLowering.handlers = {
    **Lowering.handlers,
    torch.ops.harmoq.linear.default: GpuLowering.linear,
    torch.ops.aten.convolution.default: GpuLowering.convolution,
}
