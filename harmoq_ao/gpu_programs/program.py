"""The programs of a quantized model on a GPU: made for a size when it first comes, dropped when the model changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.gpu_programs.emit import emit
from harmoq_ao.gpu_programs.fusing import fuse
from harmoq_ao.gpu_programs.lowering import GpuLowering
from harmoq_ao.gpu_programs.operands import Operands
from harmoq_ao.gpu_programs.replay import Replay
from harmoq_ao.programs.program import SizedPrograms, is_watched
from harmoq_ao.programs.record import record
from harmoq_ao.triton_kernels.launch import supported

logger = logging.getLogger(__name__)

Twin = Callable[[], nn.Module]
"""Makes a copy of the model whose float parts are float32, on the CPU."""


def make_program(model: nn.Module, example: Tensor, dtype: torch.dtype, operands: Operands) -> fx.GraphModule:
    """A model as one graph of fused kernels, for images of one size; its tensors are on the CPU.

    Args:
        model: Takes an image batch; float32, on the CPU.
        example: An image batch `[B, C, H, W]` of that size, of which the shape is read.
        dtype: Type of tokens in memory, bfloat16 or float32.
        operands: Of the model.

    Returns:
        The graph; ``missed`` in its ``meta`` says which attentions no kernel takes, and why.

    Raises:
        Unrecordable: The model's forward cannot be followed.
    """
    with torch.inference_mode(False), torch.no_grad():
        image = torch.empty(example.shape, device="meta")
        lowering = GpuLowering(record(model, image), dtype, operands)
        output = lowering.run()
        assert lowering.image is not None
        fuse(output.matrix, lowering)
        program = emit(output, lowering.image, len(example), lowering.type_of)
    program.meta["missed"] = list(lowering.missed)
    return program


class _Program:
    """A program on its device, captured once a size comes again."""

    def __init__(self, graph: fx.GraphModule, pool: Any) -> None:
        self.graph, self.pool = graph, pool
        self._replay: Replay | None = None
        self._calls = 0

    def __call__(self, image: Tensor) -> Tensor:
        self._calls += 1
        if self._replay is None and image.is_cuda and self._calls == 2:  # an image that comes alone pays for nothing
            try:
                self._replay = Replay(self.graph, image, self.pool)
            except RuntimeError as error:
                logger.warning("The model runs without a CUDA graph: %s", error)
        if self._replay is not None:
            return self._replay(image)
        output: Tensor = self.graph(image)
        return output


class GpuPrograms(SizedPrograms[_Program]):
    """Programs of one model by image size and device."""

    kernels = "GPU"

    def __init__(self) -> None:
        super().__init__()
        self._twin: nn.Module | None = None
        self._operands = Operands()
        self._pools: dict[torch.device, Any] = {}
        self._warned: set[str] = set()

    def _forget(self) -> None:
        super()._forget()
        self._twin, self._operands = None, Operands()

    def run(self, model: nn.Module, twin: Twin, image: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The model's output, float32 or of the model's type; None where its own forward is to run.

        Unlike on a CPU, a value that is not a number raises nothing: asking would wait for the GPU.

        Args:
            model: The author's model with quantized sites.
            twin: Makes the copy that programs are made from.
            image: `[B, C, H, W]`.
            dtype: Type of the model's float parts.
        """
        with self._lock:
            program = self._of(model, twin, image, dtype)
            if program is None:
                return None
            with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
                return program(image)

    def graph(self, model: nn.Module, twin: Twin, image: Tensor, dtype: torch.dtype) -> fx.GraphModule | None:
        """The program that :meth:`run` runs for an image, on its device; None where there is none."""
        with self._lock:
            program = self._of(model, twin, image, dtype)
            return None if program is None else program.graph

    def _of(self, model: nn.Module, twin: Twin, image: Tensor, dtype: torch.dtype) -> _Program | None:
        if is_watched(image):
            return None
        watch = self._watched(model)
        asked = ("triton",) if image.device.type == "cpu" else ("auto", "triton")
        if not watch.as_usual(asked) or (image.is_cuda and not supported(image.device)):
            return None
        return self._program(twin, image, dtype)

    def _program(self, twin: Twin, image: Tensor, dtype: torch.dtype) -> _Program | None:
        def make() -> _Program:
            self._twin = twin() if self._twin is None else self._twin
            made = make_program(self._twin, image, dtype, self._operands)
            self._warn(made)
            return _Program(made.to(image.device), self._pool(image.device))

        return self._kept((image.shape, image.device, image.dtype, dtype), make)

    def _pool(self, device: torch.device) -> Any:
        """Memory that the graphs of a device share: they take turns."""
        if device.type == "cuda" and device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return self._pools.get(device)

    def _warn(self, program: fx.GraphModule) -> None:
        """Say once for each reason that an attention has no kernel."""
        for _, reason in program.meta["missed"]:
            if reason not in self._warned:
                self._warned.add(reason)
                logger.warning("An attention runs without a fused GPU kernel: %s", reason)

    def sentence(self) -> str:
        """What runs on a GPU, and what helps where that is not the fused kernels."""
        if self.refusal is not None:
            return f"The fused GPU kernels are not used: {self.refusal}."
        return "On a GPU images run in fused kernels, as one CUDA graph from the second image of a size on."
