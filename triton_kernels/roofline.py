"""What each kernel cannot be faster than, at the tokens of a 512 x 512 output of a x2 model.

``python -m harmoq_ao.triton_kernels.roofline`` prints `docs/kernels.md`'s tables: time to move the bytes, time of the
real multiply-adds, and time to issue the instructions that the gate's table counts, the loop as often as it runs;
then what a block and the whole of SwinIR-light take. The first two are limits of the operation on an H200, the third
one is a limit of this code; none is a measurement.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from harmoq_ao.triton_kernels.compile_cases import CASES, Case
from harmoq_ao.triton_kernels.compile_gate import Measured, read_budget

logger = logging.getLogger(__name__)

TOKENS = 256 * 256
BYTES_PER_SECOND = 4.3e12  # measured copy bandwidth of an H200
INT8_PER_SECOND = 1580e12  # twice the measured bfloat16 rate
FLOAT16_PER_SECOND = 790e12
ISSUED_PER_SECOND = 132 * 4 * 1.98e9  # processors, schedulers each, boost clock

ISSUE_SHARE = 0.6
"""Share of the issue rate that a kernel of many loads and barriers is assumed to reach."""


@dataclass(frozen=True)
class Work:
    """One launch of a kernel.

    Attributes:
        case: Name of the compiled case.
        programs: Programs of the launch.
        channels: 16-bit values that a token reads and writes (a code counts half).
        int8: Integer multiply-adds of a token.
        float16: Floating-point ones.
    """

    case: str
    programs: int
    channels: float
    int8: int = 0
    float16: int = 0


_TILES = TOKENS // 64
_WINDOW = (_TILES, 180, 60 * 240, 2 * 64 * 60)
_MLP = (_TILES, 180, 2 * 60 * 120)
WORK = (
    Work("window / swinir-light w4", *_WINDOW),
    Work("window / swinir-light w4 regions", *_WINDOW),
    Work("window / swinir-light w8", *_WINDOW),
    Work("window / swinir-light w8 regions", *_WINDOW),
    Work("window / swinir-light bf16 weights", _TILES, 180, 0, 60 * 240 + 2 * 64 * 60),
    Work("window / swinir-light bf16 weights regions", _TILES, 180, 0, 60 * 240 + 2 * 64 * 60),
    Work("window / swinir-light paper w4 regions", *_WINDOW),
    Work("window / swin2sr-light cosine w8 regions", *_WINDOW),
    Work("mlp / swinir-light w4", *_MLP),
    Work("mlp / swinir-light w8", *_MLP),
    Work("mlp / swinir-light bf16 weights", _TILES, 180, 0, 2 * 60 * 120),
    Work("mlp / hat-s w8", _TILES, 432, 2 * 144 * 288),
    Work("mlp / swinir-classical w8", _TILES, 540, 2 * 180 * 360),
    Work("lowbit_linear / hat-s qkv w8", _TILES * 4, 144 + 432, 144 * 432),
    Work("lowbit_linear / hat-s proj w4", _TILES * 2, 144 * 2.5, 144 * 144),
    Work("lowbit_linear / dat-light qkv w4", _TILES * 2, 60 + 180, 60 * 180),
    Work("lowbit_linear / dat-light fc1 w4", _TILES, 60 + 120, 60 * 120),
    Work("attention / swinir-classical 8x8", _TILES * 6, 540 + 90, 0, 2 * 64 * 180),
    Work("attention / hat-s 16x16", _TILES * 6, 432 + 72, 0, 2 * 256 * 144),
    Work("attention / hat-s overlapping", _TILES * 6, 144 + 2.25 * 288 + 144, 0, 2 * 576 * 144),
    Work("attention / hat-s 16x16 paper", _TILES * 6, 864 + 72, 0, 2 * 256 * 144),
    Work("attention / dat-light 8x32", _TILES * 6, 180 + 60, 0, 2 * 256 * 60),
    Work("attention / drct 2 heads of 122", _TILES * 2, 732 + 122, 0, 2 * 256 * 244),
    Work("channel sums / dat-light", 6 * 64, 120, 0, 600),
    Work("channel maps / dat-light", 6, 0),
    Work("channel product / dat-light", 6 * 512, 120, 0, 600),
    Work("channel sums / restormer paper relative", 4 * 64, 384, 0, 4 * 48 * 48),
    Work("channel product / restormer paper relative", 4 * 1024, 384, 0, 4 * 48 * 48),
    Work("rowwise / sum of 180 and its norm", TOKENS // 16, 720),
    Work("rowwise / halves of 120, GELU, gate", TOKENS // 64, 180),
)

_SM_90 = " @ sm_90"
BLOCKS = 24
OTHER_LAUNCHES = 12
"""Of SwinIR-light: six convolutions of 60 channels, two of 3, two norms, and additions."""

_PRODUCTS = 6 * 9 * 60 * 60 * 2 * TOKENS / FLOAT16_PER_SECOND
_BYTES = OTHER_LAUNCHES * 3 * 60 * 2 * TOKENS / BYTES_PER_SECOND
OTHERS = (_PRODUCTS + _BYTES) / ISSUE_SHARE + OTHER_LAUNCHES * 5e-6
"""Seconds of all that is no block: multiply-adds and bytes at the same share of their rates, 5 us a launch."""


def issue_seconds(work: Work, found: Measured) -> float:
    """Time to issue the instructions of all warps of a launch."""
    case = _cases()[work.case]
    return work.programs * case.num_warps * found.executed / ISSUED_PER_SECOND


def table() -> dict[str, Measured]:
    """Machine code for sm_90 by case, as the gate's table has it."""
    _, known = read_budget()
    return {name.removesuffix(_SM_90): Measured(**row) for name, row in known.items() if name.endswith(_SM_90)}


def _cases() -> dict[str, Case]:
    return {case.name: case for case in CASES}


def rows(seconds: dict[str, float], found: dict[str, Measured]) -> Iterator[str]:
    """Lines of the table of kernels, in Markdown."""
    yield "| kernel | bytes | int8 | float16 | instructions of a warp | registers | issue |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for work in WORK:
        yield (
            f"| {work.case} | {work.channels * 2 * TOKENS / BYTES_PER_SECOND * 1e6:.1f} "
            f"| {2 * work.int8 * TOKENS / INT8_PER_SECOND * 1e6:.1f} "
            f"| {2 * work.float16 * TOKENS / FLOAT16_PER_SECOND * 1e6:.1f} "
            f"| {found[work.case].executed} | {found[work.case].registers} | {seconds[work.case] * 1e6:.1f} |"
        )


def model_rows(seconds: dict[str, float]) -> Iterator[str]:
    """Lines of the table of SwinIR-light; every second block is shifted, and has regions."""
    yield "| weights | window, mean of both | mlp | a block | 24 blocks at 60 % of issue | whole model |"
    yield "|---|--:|--:|--:|--:|--:|"
    for weights in ("w8", "w4", "bf16 weights"):
        block, mlp = block_seconds(seconds, weights), seconds[f"mlp / swinir-light {weights}"]
        yield (
            f"| {weights} | {(block - mlp) * 1e6:.1f} us | {mlp * 1e6:.1f} us | {block * 1e6:.1f} us "
            f"| {BLOCKS * block / ISSUE_SHARE * 1e3:.2f} ms | {model_seconds(seconds, weights) * 1e3:.2f} ms |"
        )


def block_seconds(seconds: dict[str, float], weights: str) -> float:
    """Issue time of a block of SwinIR-light, the mean of one with regions and one without."""
    window = sum(seconds[f"window / swinir-light {weights}{kind}"] for kind in ("", " regions")) / 2
    return window + seconds[f"mlp / swinir-light {weights}"]


def model_seconds(seconds: dict[str, float], weights: str) -> float:
    """Estimated time of SwinIR-light x2 at 256 x 256 pixels."""
    return BLOCKS * block_seconds(seconds, weights) / ISSUE_SHARE + OTHERS


def main() -> int:
    """Print the tables."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    found = table()
    seconds = {work.case: issue_seconds(work, found[work.case]) for work in WORK}
    for row in (*rows(seconds, found), "", *model_rows(seconds)):
        logger.info(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
