"""What is to be done, in steps: names, the time each is given, and chunks of them that fit into a time budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One thing that is done, with one result.

    Attributes:
        name: Kind and subject: ``check/mlp 257x60 w8``.
        seconds: What it is expected to take; it is not begun when less is left.
        limit: After so many seconds it is stopped, and has failed.
        ours: Whether its failure is ours. Another library's is only a result.
        together: Whether others may run beside it: what is timed runs alone.
    """

    name: str
    seconds: float = 8.0
    limit: float = 120.0
    ours: bool = True
    together: bool = False

    @property
    def kind(self) -> str:
        """``device``, ``prepare``, ``check``, ``compile``, ``agree``, ``sanitize``, ``time`` or ``model``."""
        return self.name.partition("/")[0]

    @property
    def subject(self) -> str:
        """What comes after the kind."""
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class Shape:
    """Images that a whole model is measured on.

    Attributes:
        model: Key of `models.MODELS`.
        scale: Upscaling factor.
        height: Of the input, in pixels.
        width: Of the input, in pixels.
        batch: Images in one call.
    """

    model: str
    scale: int
    height: int
    width: int
    batch: int = 1

    @property
    def name(self) -> str:
        """Such as ``swinir-light x2 256x256 b1``."""
        return f"{self.model} x{self.scale} {self.height}x{self.width} b{self.batch}"


MAIN = Shape("swinir-light", 2, 256, 256)
TINY = Shape("swinir-tiny", 2, 16, 16)
BASE = "float32 eager"
UNROUNDED = "our kernels, bfloat16 weights"
ALL_BITS = (8, 4, 3, 2)

_EAGER = (BASE, "float32 eager, TF32", "bfloat16 eager")
_COMPILED = (
    "bfloat16 compile, CUDA graphs",
    "bfloat16 compile, SDPA at d = 16",
    "bfloat16 compile, flex_attention",
    "torchao int8, CUDA graphs",
)
_AUTOTUNED = ("bfloat16 compile, max-autotune", "torchao int8, max-autotune")
QUICK = (BASE, "W8A8", *_EAGER[1:], *_COMPILED, *_AUTOTUNED, UNROUNDED)
FEW = (BASE, "bfloat16 eager", _COMPILED[0], "W8A8")
"""The contenders at other shapes than the main one."""

_GROWTH = (64, 128, 512, 1024, 2048)


def is_ours(contender: str) -> bool:
    """Whether a whole model is one of ours, of any width or in bfloat16: what our sources decide."""
    return contender == UNROUNDED or contender.startswith("W")


def shapes() -> Iterator[Shape]:
    """What ``--full`` measures besides the main shape, the most telling first."""
    yield from (Shape(model, 2, 256, 256) for model in ("hat-s", "dat-light"))
    yield from (Shape(MAIN.model, 2, side, side) for side in _GROWTH)
    for model in ("swinir-light", "hat-s", "dat-light"):
        yield Shape(model, 4, 128, 128)
        yield Shape(model, 2, 256, 256, 8)
        yield Shape(model, 2, 360, 640)
        yield Shape(model, 4, 180, 320)
    for model in ("hat-s", "dat-light"):
        yield Shape(model, 4, 128, 128, 8)
    yield Shape(MAIN.model, 4, 128, 128, 8)


def quick(checks: Iterable[str], timings: Iterable[str], sanitized: Iterable[str], tiny: bool = False) -> list[Step]:
    """Right or not, and the main comparison: first what runs together, then, alone, what is timed.

    Args:
        checks: Names of problems to compare with their references.
        timings: Names of problems to time.
        sanitized: Names of problems to run under compute-sanitizer.
        tiny: For the stand-in.
    """
    shape, timed = TINY if tiny else MAIN, list(timings)
    return [
        _prepare(shape, 8),
        *(Step(f"check/{name}", together=True) for name in checks),
        *(Step(f"compile/{name}", together=True) for name in timed),
        *_compile(shape, _COMPILED),
        _agree(shape, 8),
        *(Step(f"sanitize/{name}", 60, 240, together=True) for name in sanitized),
        Step("time/device", 6, 60),
        *(_model(shape, contender) for contender in FEW),
        *(Step(f"time/{name}", 3, 60) for name in timed),
        *(_model(shape, contender) for contender in QUICK if contender not in FEW),
    ]


def full(checks: Iterable[str], timings: Iterable[str], sanitized: Iterable[str], tiny: bool = False) -> list[Step]:
    """All of :func:`quick`, then more bits, models, shapes. Arguments as there."""
    steps = quick(checks, timings, sanitized, tiny)
    for shape in (TINY,) if tiny else (MAIN, *shapes()):
        main = shape.height * shape.width * shape.batch in (MAIN.height * MAIN.width, TINY.height * TINY.width)
        widths = ALL_BITS if main and shape.scale == 2 else ALL_BITS[:1]
        steps += [step(shape, bits) for bits in widths for step in (_prepare, _agree)]
        steps += _compile(shape, FEW) if _size(shape) <= 8 else []
        steps += [_model(shape, contender) for contender in FEW]
        steps += [_model(shape, f"W{bits}A{bits}") for bits in widths]
    return list(dict.fromkeys(steps))


def chunks(steps: Sequence[Step], budget: float, jobs: int) -> list[list[Step]]:
    """The steps in order, cut where their expected seconds would exceed the budget; those together share `jobs`."""
    found: list[list[Step]] = []
    left = 0.0
    for step in steps:
        seconds = step.seconds / (jobs if step.together else 1)
        if not found or seconds > left:
            found.append([])
            left = budget
        found[-1].append(step)
        left -= seconds
    return found


def _prepare(shape: Shape, bits: int) -> Step:
    seconds = 30 if shape.model == MAIN.model else 150
    return Step(f"prepare/{shape.model} x{shape.scale} w{bits}", seconds, 480, together=True)


def _agree(shape: Shape, bits: int) -> Step:
    return Step(f"agree/{shape.model} x{shape.scale} w{bits}", 20, 120, together=True)


def _compile(shape: Shape, contenders: Iterable[str]) -> list[Step]:
    """torch keeps what it compiled: done by several processes at a time, before anything is timed."""
    names = (name for name in contenders if name in _COMPILED)
    return [Step(f"compile/{shape.name}/{name}", 90, 300, ours=False, together=True) for name in names]


def _model(shape: Shape, contender: str) -> Step:
    # Autotuning tries kernels out, alone; the rest is compiled before, as far as it fits beside others.
    compiling = 150 if contender in _AUTOTUNED else 35 if contender in _COMPILED else 10
    seconds = compiling + 0.6 * _size(shape)
    return Step(f"model/{shape.name}/{contender}", seconds, 240 + 4 * _size(shape), ours=is_ours(contender))


def _size(shape: Shape) -> float:
    """Of the work for one batch; that of the main shape is 1."""
    pixels = shape.batch * shape.height * shape.width / (MAIN.height * MAIN.width)
    return pixels if shape.model == MAIN.model else 3 * pixels
