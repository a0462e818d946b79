"""Whole models that are compared on a GPU: each a function from float32 images to float32 images.

All float ones are prepared for the size of the image and compiled for its shape, as whoever wants them fast would do.
"float32 eager" has torch's own setting: TF32 in convolutions, not in matrix products; "TF32" has it in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import float_model, quantized_model
from benchmarks.gpu.plan import ALL_BITS, BASE, UNROUNDED, Shape
from benchmarks.peers import Run, bfloat16_run, flex, for_size, padded_attention, sdpa, torchao_int8
from harmoq_ao.gpu_programs.operands import Operands
from harmoq_ao.gpu_programs.program import make_program
from harmoq_ao.gpu_programs.replay import Replay


@dataclass(frozen=True)
class Subject:
    """What a contender is made for.

    Attributes:
        shape: Model and images.
        device: A GPU, or the CPU with Triton's interpreter.
        work: Folder for our saved models.
    """

    shape: Shape
    device: torch.device
    work: Path

    def image(self, seed: int) -> Tensor:
        """A batch, uniform in 0..1, the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        size = (self.shape.batch, 3, self.shape.height, self.shape.width)
        return torch.rand(size, generator=generator, device=self.device)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The float model, prepared for the size."""
        model = float_model(self.shape.model, self.shape.scale).to(self.device, dtype)
        return for_size(model, (self.shape.height, self.shape.width))


def _float32(subject: Subject) -> Run:
    return subject.model()


def _tf32(subject: Subject) -> Run:
    model = subject.model()

    def run(image: Tensor) -> Tensor:
        with _matmuls("high"):
            result: Tensor = model(image)
        return result

    return run


@contextmanager
def _matmuls(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _bfloat16(subject: Subject) -> Run:
    return bfloat16_run(subject.model(torch.bfloat16))


def _compiled(subject: Subject, mode: str, change: Callable[[nn.Module], nn.Module] = lambda model: model) -> Run:
    """Conversions from and to float32 are part of what is compiled."""
    model = change(subject.model(torch.bfloat16))
    torch._dynamo.reset()
    # The stand-in is for the way through this program, not for compiling C++.
    how: dict[str, Any] = {"mode": mode} if subject.device.type == "cuda" else {"backend": "eager"}
    compiled = torch.compile(bfloat16_run(model), dynamic=False, **how)

    def run(image: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the result of the call before is not needed any more
        result: Tensor = compiled(image)
        return result

    return run


def _ours(subject: Subject, bits: int) -> Run:
    """What a user gets who moves the model to the device."""
    shape = subject.shape
    quantized = quantized_model(shape.model, shape.scale, bits, subject.work).to(subject.device)
    if subject.device.type != "cuda":
        quantized.use_backend("triton")
    return quantized


def _unrounded(subject: Subject) -> Run:
    """The same program of the same kernels, whose linears stay in bfloat16: what is left to integers alone."""
    shape, image = subject.shape, subject.image(0)
    quantized = quantized_model(shape.model, shape.scale, 8, subject.work)
    program = make_program(quantized.float32_twin(), image.cpu(), torch.bfloat16, Operands(floats=True))
    program = program.to(subject.device)
    return Replay(program, image) if image.is_cuda else program


_GRAPHS, _TUNED = "reduce-overhead", "max-autotune"  # both with CUDA graphs
CONTENDERS: dict[str, Callable[[Subject], Run]] = {
    BASE: _float32,
    "float32 eager, TF32": _tf32,
    "bfloat16 eager": _bfloat16,
    "bfloat16 compile, CUDA graphs": partial(_compiled, mode=_GRAPHS),
    "bfloat16 compile, max-autotune": partial(_compiled, mode=_TUNED),
    "bfloat16 compile, SDPA at d = 16": partial(_compiled, mode=_GRAPHS, change=partial(padded_attention, core=sdpa)),
    "bfloat16 compile, flex_attention": partial(_compiled, mode=_GRAPHS, change=partial(padded_attention, core=flex)),
    "torchao int8, CUDA graphs": partial(_compiled, mode=_GRAPHS, change=torchao_int8),
    "torchao int8, max-autotune": partial(_compiled, mode=_TUNED, change=torchao_int8),
    UNROUNDED: _unrounded,
    **{f"W{bits}A{bits}": partial(_ours, bits=bits) for bits in ALL_BITS},
}
