"""Which steps one kernel computes: norms in front, GELU between, norms and residuals behind, whole window attention.

Steps are joined where nothing else reads what lies between them. What a matrix is made of changes; matrices, and who
reads them, do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.common.errors import KernelError
from harmoq_ao.cpu_kernels.rowwise import Broadcast, Op, RowProgram
from harmoq_ao.gpu_programs.kernels import AttentionCore, Linear, Mlp, Producer, WindowAttention
from harmoq_ao.gpu_programs.lowering import GpuLowering, instructions
from harmoq_ao.gpu_programs.operands import LayerNorm
from harmoq_ao.gpu_programs.torch_steps import Contraction
from harmoq_ao.programs.emit import needed, readers_of
from harmoq_ao.programs.steps import Matrix, ModuleStep, Read, RowStep, Step
from harmoq_ao.triton_kernels.attention_operands import FUSED_HEAD_DIM
from harmoq_ao.triton_kernels.launch import MAX_CHANNELS
from harmoq_ao.triton_kernels.window_attention import FUSED_CHANNELS, FUSED_TOKENS

M = TypeVar("M", bound=nn.Module)
_GELUS = {Unary.GELU: "erf", Unary.GELU_TANH: "tanh"}


def fuse(last: Matrix, lowering: GpuLowering) -> None:
    """Join the steps behind a matrix, in place.

    Args:
        last: The matrix that the program is for.
        lowering: The walk that made it.
    """
    fusing = _Fusing(last, lowering)
    front = (
        fusing.affine,
        fusing.activation,
        fusing.norm_in_front,
        fusing.gelu,
        fusing.mlp,
        fusing.window_attention,
        fusing.gate,
    )
    for join in (*front, fusing.norm_behind, fusing.residual):
        fusing.everywhere(join)


class _Fusing:
    def __init__(self, last: Matrix, lowering: GpuLowering) -> None:
        self.last, self.operands, self.type_of = last, lowering.operands, lowering.type_of
        self.readers: dict[Matrix, list[tuple[Step, Read]]] = {}

    def everywhere(self, join: Callable[[Step], bool]) -> None:
        """Try a rule on every step, in order; a step that was joined is met again as another."""
        steps = needed(self.last)
        self.readers = readers_of(steps)
        for step in steps:
            if join(step):
                self.readers = readers_of(needed(self.last))

    # --- what is asked of steps ---------------------------------------------------------------------------------------

    def alone(self, matrix: Matrix, reader: Step) -> bool:
        """Whether a step is all that reads a matrix."""
        return matrix is not self.last and {id(step) for step, _ in self.readers[matrix]} == {id(reader)}

    def whole(self, read: Read) -> bool:
        """Whether a step reads all columns."""
        return read.first == 0 and read.width == read.matrix.columns

    def norm(self, step: Step | None) -> LayerNorm | None:
        """The norm that a step is, of all columns of what it reads."""
        found = _single(step, Op.LAYER_NORM)
        if found is None or step is None or not self.whole(step.reads[0]):
            return None
        (*_, weight, bias, eps), program = found
        factor, shift = (None if place < 0 else program.constants[place] for place in (weight, bias))
        return LayerNorm(factor, shift, program.numbers[eps])

    def takes_over(self, producer: Step | None, step: Step) -> bool:
        """Let a step make what another made of its result."""
        assert isinstance(producer, ModuleStep)
        (matrix,) = step.results
        matrix.step, producer.results, producer.dtype = producer, [matrix], self.type_of(matrix)
        if isinstance(producer.module, (Linear, Contraction)):
            producer.module.out_dtype = producer.dtype
        return True

    # --- rules --------------------------------------------------------------------------------------------------------

    def norm_in_front(self, step: Step) -> bool:
        """A norm whose affine is part of a linear's quantizer; computed again by each linear behind it."""
        module = _module(step, Linear)
        if module is None or not self.whole(step.reads[0]):
            return False
        norm = self.norm(step.reads[0].matrix.step)
        if norm is None or module.columns > MAX_CHANNELS:
            return False
        try:
            module.behind(norm, self.operands)
        except KernelError:  # a range for each token
            return False
        source = step.reads[0].matrix.step
        assert source is not None
        step.reads[0] = source.reads[0]
        return True

    def affine(self, step: Step) -> bool:
        """A factor and a shift of each channel behind a contraction, which has weights and a bias to put them in."""
        scale, shift = _affine(step)
        source = step.reads[0].matrix if step.reads else self.last
        module = _module(source.step, Linear) or _module(source.step, Contraction)
        if (scale is None and shift is None) or module is None:
            return False
        if not self.whole(step.reads[0]) or not self.alone(source, step):
            return False
        if isinstance(module, Contraction):
            if module.activation is not None:
                return False
            module.fold(scale, shift)
        elif scale is None and shift is not None:
            module.shift(shift, self.operands)
        else:
            return False
        return self.takes_over(source.step, step)

    def activation(self, step: Step) -> bool:
        """A function of each value behind a contraction in floats."""
        found = _single(step, Op.UNARY)
        source = step.reads[0].matrix if step.reads else self.last
        module = _module(source.step, Contraction)
        if found is None or module is None or not module.ours or module.activation is not None or module.adds:
            return False
        if not self.whole(step.reads[0]) or not self.alone(source, step):
            return False
        operands, program = found
        module.activation = Unary(operands[0]), program.numbers[operands[-1]]
        return self.takes_over(source.step, step)

    def gelu(self, step: Step) -> bool:
        """GELU behind a linear."""
        found = _single(step, Op.UNARY)
        kind = None if found is None else _GELUS.get(Unary(found[0][0]))
        source = step.reads[0].matrix
        module = _module(source.step, Linear)
        if kind is None or module is None or not self.whole(step.reads[0]) or not self.alone(source, step):
            return False
        module.gelu = kind
        return self.takes_over(source.step, step)

    def mlp(self, step: Step) -> bool:
        """Two linears with a GELU between."""
        fc2 = _module(step, Linear)
        source = step.reads[0].matrix
        fc1 = _module(source.step, Linear)
        if fc1 is None or fc2 is None or fc1.gelu == "none" or fc2.gelu != "none":
            return False
        both = not fc2.norm and self.whole(step.reads[0]) and self.alone(source, step)
        static = fc1.packed.value.static and fc2.packed.value.static
        if not both or not static or max(fc1.columns, fc2.width) > MAX_CHANNELS:
            return False
        assert source.step is not None
        _becomes(step, Mlp(fc1, fc2), [source.step.reads[0]])
        return True

    def window_attention(self, step: Step) -> bool:
        """qkv, attention and projection of windows that one program holds."""
        proj = _module(step, Linear)
        mixed = step.reads[0].matrix
        core = _module(mixed.step, AttentionCore)
        if proj is None or core is None or proj.norm or proj.gelu != "none" or not self.alone(mixed, step):
            return False
        assert mixed.step is not None
        sources = {read.matrix for read in mixed.step.reads}
        qkv = _module(next(iter(sources)).step, Linear) if len(sources) == 1 else None
        if qkv is None or qkv.gelu != "none" or not self.whole(step.reads[0]):
            return False
        (source,) = sources
        width = core.heads * core.head_dim
        windows = core.windows
        usual = core.firsts == (0, width, 2 * width) and source.columns == 3 * width and windows.key_index is None
        small = windows.index.tensor.shape[1] <= FUSED_TOKENS and max(qkv.columns, proj.width) <= FUSED_CHANNELS
        small = small and core.head_dim <= FUSED_HEAD_DIM
        if not (usual and small and self.alone(source, mixed.step)):
            return False
        assert source.step is not None
        if not self.whole(source.step.reads[0]):
            return False
        sites, eps = (qkv.site, proj.site), None if qkv.norm is None else qkv.norm.eps
        try:
            packed = self.operands.attention(core.spec, sites, qkv.norm)
        except KernelError:
            return False
        _becomes(step, WindowAttention(core.spec, packed, windows, eps, sites, proj.width), [source.step.reads[0]])
        return True

    def gate(self, step: Step) -> bool:
        """Two results of kernels multiplied in front of a linear; what token-wise steps make, they also multiply."""
        module = _module(step, Linear)
        if module is None or module.norm is not None or not module.packed.value.static or not self.whole(step.reads[0]):
            return False
        source = step.reads[0].matrix
        found = _single(source.step, Op.BINARY)
        if found is None or found[0][0] != Binary.MUL or found[0][-1] != Broadcast.NONE or not self.alone(source, step):
            return False
        assert source.step is not None
        left, right = source.step.reads
        if isinstance(left.matrix.step, RowStep) or isinstance(right.matrix.step, RowStep):
            return False
        module.first, module.gate = left.first, right.first
        step.reads[:1] = [left, right]
        return True

    def norm_behind(self, step: Step) -> bool:
        """A norm behind a kernel that can take it."""
        norm = self.norm(step)
        source = step.reads[0].matrix
        module = _module(source.step, Producer)
        if norm is None or module is None or not module.takes_norm or module.adds or module.after is not None:
            return False
        if not self.alone(source, step):
            return False
        module.normalise(norm)
        return self.takes_over(source.step, step)

    def residual(self, step: Step) -> bool:
        """A residual that a kernel adds last."""
        found = _single(step, Op.BINARY)
        if found is None or found[0][0] != Binary.ADD or found[0][-1] != Broadcast.NONE:
            return False
        if not all(self.whole(read) for read in step.reads):
            return False
        for mine, other in (step.reads, step.reads[::-1]):
            module = _module(mine.matrix.step, Producer)
            if module is None or module.adds or mine.matrix is other.matrix or not self.alone(mine.matrix, step):
                continue
            if isinstance(module, Contraction) and not module.ours:
                continue
            typed = isinstance(module, (Linear, Contraction))
            if not typed and self.type_of(step.results[0]) != self.type_of(mine.matrix):
                continue
            assert mine.matrix.step is not None
            module.adds = True
            mine.matrix.step.reads.append(other)
            return self.takes_over(mine.matrix.step, step)
        return False


def _module(step: Step | None, kind: type[M]) -> M | None:
    return step.module if isinstance(step, ModuleStep) and isinstance(step.module, kind) else None


def _single(step: Step | None, op: Op) -> tuple[list[int], RowProgram] | None:
    """Operands and constants of a token-wise step that is one instruction of a kind."""
    if not isinstance(step, RowStep):
        return None
    found = instructions(step)
    return found[0][1:] if len(found) == 1 and found[0][0] is op else None


def _affine(step: Step) -> tuple[Tensor | None, Tensor | None]:
    """Factor and shift of each channel that a token-wise step is; None for both where it is another."""
    vectors, number = _single(step, Op.AFFINE), _single(step, Op.SCALAR)
    if vectors is not None:
        (*_, scale, shift), program = vectors
        return None if scale < 0 else program.constants[scale], None if shift < 0 else program.constants[shift]
    if number is None or number[0][0] == Binary.SUB:
        return None, None
    value = torch.full((step.results[0].columns,), number[1].numbers[number[0][-1]])
    return (value, None) if number[0][0] == Binary.MUL else (None, value)


def _becomes(step: Step, module: Producer, reads: list[Read]) -> None:
    assert isinstance(step, ModuleStep)
    step.module, step.reads = module, list(reads)
