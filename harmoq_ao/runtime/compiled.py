"""A quantized model through `torch.compile`: our integer contractions and attention, its fusion between them.

The float parts (norms, rounding to codes, activations, residuals, depthwise convolutions) are most of what a quantized
model costs on a CPU. Each size is exported, what depends on the size alone is folded, and the flat graph is compiled by
itself, which takes a minute and a C++ compiler: upscale images in tiles of one size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harmoq_ao.common.errors import CompilerError
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.images import check_image_tensor
from harmoq_ao.kernels.compiler_view import for_compiler
from harmoq_ao.runtime.fixed_size import fixed_size
from harmoq_ao.runtime.per_size import PerSizeModel

Program = Callable[[Tensor], Tensor]
Size = tuple[torch.Size, torch.dtype, torch.device]


class CompiledModel(PerSizeModel[Size, Program]):
    """A quantized model that `torch.compile` runs; call it as the original. Calls take turns."""

    def __init__(self, quantized: QuantizedModel, keep: int) -> None:
        super().__init__(quantized, keep)
        self.quantized = quantized

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Upscale an image batch `[B, C, H, W]` in 0..1; the result has the type of the input.

        The first image of a size compiles the model for it, which takes many times as long as a call.

        Raises:
            InputError: Not an image batch, not finite, or of another number of channels.
            CompilerError: There is no C++ compiler.
        """
        check_image_tensor(image, channels=(self.example_shapes[0][1],), batched=True)
        image = image.contiguous()  # the program is for these strides: a tile has those of its image
        with self.lock:
            size = (image.shape, image.dtype, image.device)
            return self.program(size, lambda: compile_for(self.quantized, image))(image)


def compile_model(quantized: QuantizedModel, *, keep: int = 4) -> CompiledModel:
    """Let `torch.compile` run a quantized model.

    Args:
        quantized: From ``convert_harmoq`` or ``load_quantized``; left as it is, its weights are shared. Later changes
            of its float type or kernels are not seen for sizes that are compiled already.
        keep: Sizes that stay compiled.

    Raises:
        ConfigError: `keep` is not a whole number from 1 on.
    """
    return CompiledModel(quantized, keep)


def compile_for(quantized: QuantizedModel, example: Tensor) -> Program:
    """The program for images like `example`.

    Raises:
        CompilerError: There is no C++ compiler.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # these import the compiler
    from torch._inductor.exc import InvalidCxxCompiler

    with for_compiler():
        graph = fixed_size(quantized, example, cuda_graph=False).graph
    program = torch.compile(graph, dynamic=False, fullgraph=True)
    try:
        program(example)
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, InvalidCxxCompiler):
            raise
        raise CompilerError(
            "torch.compile needs a C++ compiler",
            found=str(error.inner_exception),
            expected="g++ or clang++ on the path, or its name in CXX",
            remedy="install one, or run the model as it is",
        ) from error
    return program
