"""The programs of a quantized model on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from harmoq_ao.gpu_programs.emit import emit
from harmoq_ao.gpu_programs.fusing import fuse
from harmoq_ao.gpu_programs.lowering import GpuLowering
from harmoq_ao.gpu_programs.operands import Operands
from harmoq_ao.programs.record import record


def make_program(model: nn.Module, example: Tensor, dtype: torch.dtype, operands: Operands) -> fx.GraphModule:
    """A model as one graph of fused kernels, for images of one size; its tensors are on the CPU.

    Args:
        model: Takes an image batch; float32, on the CPU.
        example: An image batch `[B, C, H, W]` of that size, of which the shape is read.
        dtype: Type of tokens in memory, bfloat16 or float32.
        operands: Of the model.

    Raises:
        Unrecordable: The model's forward cannot be followed.
    """
    with torch.inference_mode(False), torch.no_grad():
        lowering = GpuLowering(record(model, example), dtype, operands)
        output = lowering.run()
        assert lowering.image is not None
        fuse(output.matrix, lowering)
        return emit(output, lowering.image, len(example), lowering.type_of)
