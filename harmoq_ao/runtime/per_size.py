"""Models that are compiled anew for every image size: what `compiled.py` and `openvino/` share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import nn

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.conversion.model import QuantizedModel

Program = TypeVar("Program")
Size = TypeVar("Size", bound=Hashable)


class PerSizeModel(nn.Module, Generic[Size, Program]):
    """A quantized model with a program for each of the last few image sizes; call it as the original.

    Args:
        quantized: The model.
        keep: Sizes that stay compiled.

    Attributes:
        keep: Likewise.
        traits: Scale, size requirements and architecture.
        example_shapes: Image shapes the model was prepared on.
        lock: Held during a call, so that calls from several threads take turns.

    Raises:
        ConfigError: `keep` is not a whole number from 1 on.
    """

    def __init__(self, quantized: QuantizedModel, keep: int) -> None:
        super().__init__()
        self.keep = check_count("keep", keep)
        self.traits = quantized.traits
        self.example_shapes = quantized.example_shapes
        self.lock = threading.Lock()
        self._programs: OrderedDict[Size, Program] = OrderedDict()

    def program(self, size: Size, make: Callable[[], Program]) -> Program:
        """The program of a size, made now if it is not there; the least recently used one makes room.

        Args:
            size: Whatever tells apart images that need programs of their own.
            make: Makes the program of this size.
        """
        if size not in self._programs:
            while len(self._programs) >= self.keep:  # before the new one is made: programs hold their own weights
                self._programs.popitem(last=False)
            self._programs[size] = make()
        self._programs.move_to_end(size)
        return self._programs[size]


def check_count(name: str, value: object) -> int:
    """A whole number from 1 on, or ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number", found=f"{name}={value!r}", expected="1 or more")
    return value
