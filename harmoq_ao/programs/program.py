"""The programs of a quantized model: made for a size when it first comes, dropped when the model changes."""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.allocator import large_blocks_returned, return_freed_memory
from harmoq_ao.cpu_kernels import library
from harmoq_ao.cpu_kernels.replay import NotReplayableError, Replay
from harmoq_ao.cpu_kernels.replay import record as record_calls
from harmoq_ao.lowering.fusing import is_traced
from harmoq_ao.programs.emit import emit
from harmoq_ao.programs.lower import Lowering
from harmoq_ao.programs.record import Unrecordable, record, version_of
from harmoq_ao.quant.integer_reference import nan_error
from harmoq_ao.sites.quantized import QuantizedSite

logger = logging.getLogger(__name__)

SMALLEST = 64 * 64
"""Pixels of an image from which on a program pays for being made."""
HEAVY = 192 * 192
"""Pixels from which on making a program scatters more freed memory over the heap than returning it costs time."""
KEPT = 4
"""Sizes whose programs are kept."""
HALF = "avx512_bf16"
"""The instruction set with products of bfloat16."""


def make_program(model: nn.Module, example: Tensor, half: bool, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """A model as one graph of fused kernels, for images of one size.

    Args:
        model: Takes an image batch; its sites are quantized or float.
        example: An image batch `[B, C, H, W]` of that size.
        half: Multiply bfloat16 where operands are not quantized, and sum in float32.
        dtype: Type of the model's float parts.

    Raises:
        Unrecordable: The model's forward cannot be followed.
    """
    # In inference mode torch does not take composite operators apart.
    with torch.inference_mode(False), torch.no_grad():
        lowering = Lowering(record(model, example, dtype), half)
        output = lowering.run()
        assert lowering.image is not None
        return emit(output, lowering.image, len(example))


P = TypeVar("P")


class SizedPrograms(Generic[P]):
    """Programs of one model by what they are for, the last few; dropped when the model changes.

    Attributes:
        refusal: Why the model has none, once that is known.
    """

    kernels: ClassVar[str]
    """What the programs are made of, in a sentence."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        self._programs: OrderedDict[Any, P] = OrderedDict()
        self._watch: Watch | None = None
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def _forget(self) -> None:
        """Drop what was made of the model as it was."""
        self._programs.clear()
        self.refusal = None

    def _watched(self, model: nn.Module) -> Watch:
        if self._watch is None or not self._watch.holds(model):
            self._forget()
            self._watch = Watch(model)
        return self._watch

    def _kept(self, key: Any, make: Callable[[], P]) -> P | None:
        """The program for a key, made if there is none; None where the model has none."""
        if self.refusal is not None:
            return None
        if key not in self._programs:
            try:
                made = make()
            except torch.OutOfMemoryError:  # of a GPU: for its owner to see
                raise
            except Exception as error:  # whatever an author's forward does: it runs as it is then
                self._refuse(error)
                return None
            while len(self._programs) >= KEPT:
                self._programs.popitem(last=False)
            self._programs[key] = made
        self._programs.move_to_end(key)
        return self._programs[key]

    def _refuse(self, error: Exception) -> None:
        self.refusal = f"{error}" if isinstance(error, Unrecordable) else f"{type(error).__name__}: {error}"
        logger.warning("The model runs without fused %s kernels: %s", self.kernels, self.refusal)


class Program:
    """A program whose operators are called without Python from the second image on.

    Args:
        graph: Takes an image batch.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self._replay: Replay | None = None
        self._fixed = True

    def __call__(self, image: Tensor) -> Tensor:
        """The output; grad mode and autocast must be off."""
        if self._replay is not None and self._replay.takes(image):
            return self._replay(image)
        if self._replay is None and self._fixed:
            try:
                output, self._replay = record_calls(self.graph, image)
                return output
            except NotReplayableError as error:
                self._fixed = False
                logger.debug("A program is not replayed: %s", error)
            finally:
                if _pixels(image) >= HEAVY:
                    return_freed_memory()
        result: Tensor = self.graph(image)
        return result


class Programs(SizedPrograms[Program]):
    """Programs of one model for a CPU, by image size."""

    kernels = "CPU"

    def run(self, model: nn.Module, image: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The model's output; None where its own forward is to run.

        Args:
            model: The author's model with quantized sites.
            image: `[B, C, H, W]`.
            dtype: Type of the model's float parts.

        Raises:
            InputError: A value on the way was not a number.
        """
        if image.device.type != "cpu" or _pixels(image) < SMALLEST or is_watched(image):
            return None
        with self._lock:
            watch = self._watched(model)
            program = self._program(model, image, dtype) if watch.as_usual() and library.kernels() is not None else None
        if program is None:
            return None
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                output = program(image)
        except (RuntimeError, TypeError, IndexError) as error:  # an operator that shapes alone did not speak for
            self._refuse(error)
            return None
        if bool(output.isnan().any()):  # codes have no NaN, but what is added to them keeps it
            raise nan_error()
        return output

    def _program(self, model: nn.Module, image: Tensor, dtype: torch.dtype) -> Program | None:
        def make() -> Program:
            with large_blocks_returned():
                made = Program(make_program(model, image, library.status().isa == HALF, dtype))
            if _pixels(image) >= HEAVY:
                gc.collect()  # of graphs whose nodes refer to each other, with an index of every token
            # graphs of islands may have been traced meanwhile, with tensors of their own
            self._watch = Watch(model)
            return made

        return self._kept((image.shape, dtype), make)

    def sentence(self) -> str:
        """What runs on a CPU, and what helps where that is not the fused kernels."""
        if self.refusal is not None:
            return f"The CPU kernels are not used: {self.refusal}."
        status = library.status()
        if not status.available:
            return status.sentence
        return f"Images of at least {SMALLEST} pixels run in fused kernels, whatever a site's own is. {status.sentence}"


def _pixels(image: Tensor) -> int:
    return image.shape[-2] * image.shape[-1]


def is_watched(image: Tensor) -> bool:
    """Whether somebody records what runs: then modules and operators are to be seen."""
    if is_traced():
        return True
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    return type(image) not in (Tensor, nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0 or any(hooks)


class Watch:
    """What a program was made from: it must not outlive it. Asking takes a fraction of a millisecond.

    Args:
        model: The model as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = list(model.modules())
        self._children = [(m._modules, n, c) for m in modules for n, c in m._modules.items()]
        own = [d for m in modules for d in (m._parameters, m._buffers)]
        self._named = [(d, n, t) for d in own for n, t in d.items()]
        self._tensors = [t for _, _, t in self._named if t is not None]
        self._hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._modules = modules
        self._sites = [m for m in modules if isinstance(m, QuantizedSite)]
        self._values = self._contents()
        self._training = [m.training for m in modules]  # some that have no say in it are never told

    def _contents(self) -> list[int]:
        return [n for t in self._tensors for n in (t.data_ptr(), version_of(t))]

    def holds(self, model: nn.Module) -> bool:
        """Whether the model is still the same, value for value."""
        same = model is self.model and all(d.get(n) is c for d, n, c in self._children)
        same = same and all(d.get(n) is t for d, n, t in self._named)
        return same and self._contents() == self._values and [m.training for m in self._modules] == self._training

    def as_usual(self, backends: tuple[str, ...] = ("auto",)) -> bool:
        """Whether the modules compute what they were made for, with nobody looking on."""
        hooked = self.model.training or any(self._hooks)
        return not hooked and all(site.backend in backends for site in self._sites)
