"""Calls of operators, recorded once and made again without Python.

Between kernels Python finds its own code and objects gone from the caches, and takes several times as long as alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from harmoq_ao.cpu_kernels import library

_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2, torch.channels_last_3d: 3}


class NotReplayableError(Exception):
    """What ran is no fixed sequence of operators on tensors."""


class Replay:
    """The calls of operators that a function of one tensor made; see :func:`record`.

    Its reference is the function: the same operators run with the same constants in the same order, so results are the
    same bit for bit. Several threads may use it at a time; what it makes on the way is freed after its last use.

    Args:
        calls: The recorded calls.
        example: What was given, for its type and layout.
    """

    def __init__(self, calls: Any, example: Tensor) -> None:
        self._calls, self._layout = calls, _layout(example)

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor has the shape, type and layout of the one that was recorded."""
        return _layout(tensor) == self._layout

    def __call__(self, tensor: Tensor) -> Tensor:
        """The result for a tensor that it takes.

        Raises:
            RuntimeError: An operator failed.
        """
        result: Tensor = self._calls.run(tensor)
        return result


def record(function: Callable[[Tensor], Tensor], example: Tensor) -> tuple[Tensor, Replay]:
    """Run a function whose calls depend on nothing but the shape, type and layout of what it is given.

    Returns:
        What it gave for the example, and its calls.

    Raises:
        NotReplayableError: It reads values of tensors, or calls something with what is no argument of operators.
        RuntimeError: There are no CPU kernels, or the function raised it.
    """
    calls = getattr(torch.classes, library.required().name).Replay()
    recording = _Recording(calls, example)
    with torch.no_grad(), recording:
        result = function(example)
    if recording.failure is not None:
        raise NotReplayableError(recording.failure)
    if result not in recording.slots:
        raise NotReplayableError("the result is no tensor that an operator gave")
    calls.finish(recording.slots[result])
    return result, Replay(calls, example)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout


class _Recording(TorchDispatchMode):
    """Passes calls on, and writes them down until it cannot: what runs is never disturbed."""

    def __init__(self, calls: Any, example: Tensor) -> None:
        super().__init__()
        self.calls = calls
        self.failure: str | None = None
        self.slots = WeakTensorKeyDictionary({example: 0})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.failure is None:
            try:
                self._write(func._schema, args, kwargs or {}, result)
            except (RuntimeError, TypeError) as error:
                self.failure = f"{func}: {error}"
        return result

    def _write(self, schema: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        self.calls.call(schema.name, schema.overload_name)
        for place, argument in enumerate(schema.arguments):
            default = argument.default_value if argument.has_default_value() else None
            self._argument(args[place] if place < len(args) else kwargs.get(argument.name, default))
        parts = result if isinstance(result, list | tuple) else [] if result is None else [result]
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError("a value that is no tensor")
        first = self.calls.results(len(parts))
        for number, part in enumerate(parts):
            self.slots[part] = first + number

    def _argument(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            self.calls.list(len(value))
            for item in value:
                self._argument(item)
        elif isinstance(value, Tensor) and value in self.slots:
            self.calls.slot(self.slots[value])
        else:
            self.calls.constant(_FORMATS[value] if isinstance(value, torch.memory_format) else value)
