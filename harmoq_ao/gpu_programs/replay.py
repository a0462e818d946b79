"""A program captured as a CUDA graph: one launch for all of its kernels, whatever Python would take to launch them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.common.errors import InputError

_WARM_UP = 3  # calls in which kernels are compiled and workspaces allocated, outside of the capture


class Replay:
    """A captured CUDA graph with its own input and output; calls must take turns.

    Args:
        program: What to capture; takes an image batch.
        example: A batch of its size, on a GPU.
        pool: Memory that it shares with other graphs which never run at the same time; None for its own.

    Raises:
        InputError: The example is not on a GPU.
        RuntimeError: Something in the program cannot be captured.
    """

    def __init__(self, program: Callable[[Tensor], Tensor], example: Tensor, pool: Any = None) -> None:
        if not example.is_cuda:
            raise InputError("CUDA graphs are for GPUs", found=example.device, expected="an example on cuda")
        with torch.no_grad(), torch.cuda.device(example.device):
            self._input = example.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    program(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._output = program(self._input)

    def __call__(self, image: Tensor) -> Tensor:
        """The output for an image batch of the size."""
        with torch.cuda.device(image.device):
            self._input.copy_(image)
            self._graph.replay()
            return self._output.clone()
