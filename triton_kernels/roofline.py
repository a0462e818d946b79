"""What each kernel cannot be faster than, at the tokens of a 512 x 512 output of a x2 model.

``python -m harmoq_ao.triton_kernels.roofline`` prints `docs/kernels.md`'s table: time to move the bytes, time of the
real multiply-adds, and time to issue the instructions of the compiled code, with the loop counted as often as it runs.
The first two are limits of the operation on an H200, the third one of this code; none is a measurement.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from harmoq_ao.triton_kernels.compile_cases import CASES
from harmoq_ao.triton_kernels.compile_gate import ARCHITECTURES, compile_case, disassemble, opcodes_of

logger = logging.getLogger(__name__)

TOKENS = 256 * 256
BYTES_PER_SECOND = 4.3e12  # measured copy bandwidth of an H200
INT8_PER_SECOND = 1580e12  # twice the measured bfloat16 rate
FLOAT16_PER_SECOND = 790e12
ISSUED_PER_SECOND = 132 * 4 * 1.98e9  # processors, schedulers each, boost clock


@dataclass(frozen=True)
class Work:
    """One launch of a kernel.

    Attributes:
        case: Name of the compiled case.
        programs: Programs of the launch.
        trips: How often the main loop runs; 1 where there is none.
        channels: 16-bit values that a token reads and writes (a code counts half).
        int8: Integer multiply-adds of a token.
        float16: Floating-point ones.
    """

    case: str
    programs: int
    trips: int
    channels: float
    int8: int = 0
    float16: int = 0


_TILES = TOKENS // 64
WORK = (
    Work("quantize / static 8 bit", _TILES, 1, 60 * 1.5),
    Work("lowbit_linear / swinir-light qkv w4", _TILES * 3, 1, 60 + 180, 60 * 180),
    Work("lowbit_linear / swinir-light qkv w8", _TILES * 3, 1, 60 + 180, 60 * 180),
    Work("lowbit_linear / hat-s qkv w4", _TILES * 7, 3, 144 + 432, 144 * 432),
    Work("lowbit_linear / hat-s proj codes w4", _TILES * 3, 3, 144 * 1.5, 144 * 144),
    Work("mlp / swinir-light w4", _TILES, 1, 120, 2 * 60 * 120),
    Work("mlp / swinir-light w8", _TILES, 1, 120, 2 * 60 * 120),
    Work("mlp / dat-light w4", _TILES, 1, 120, 2 * 60 * 120),
    Work("mlp / hat-s w4", _TILES, 5, 288, 2 * 144 * 288),
    Work("window / swinir-light w4", _TILES, 6, 120, 60 * 240, 2 * 64 * 60),
    Work("window / swinir-light w8", _TILES, 6, 120, 60 * 240, 2 * 64 * 60),
    Work("window / swinir-light paper w4", _TILES, 6, 120, 60 * 240 + 2 * 64 * 60),
    Work("attention / hat-s 16x16", _TILES * 6, 4, 432 + 72, 0, 2 * 256 * 144),
    Work("attention / dat-light 8x32", _TILES * 6, 4, 180 + 60, 0, 2 * 256 * 60),
)


def executed(listing: str, trips: int) -> int:
    """Instructions that a warp executes: all of them once, those of the longest backward branch ``trips`` times."""
    places: dict[str, int] = {}
    count, longest = 0, 0
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            places[label[1]] = count
        count += len(opcodes_of(line + "\n"))
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and branch[1] in places:
            longest = max(longest, count - places[branch[1]])
    return count + (trips - 1) * longest


def rows(work: Iterable[Work] = WORK) -> Iterable[str]:
    """Lines of the table, in Markdown."""
    cases = {case.name: case for case in CASES}
    yield "| kernel | bytes | int8 | float16 | instructions of a warp | issue |"
    yield "|---|---|---|---|---|---|"
    for item in work:
        case = cases[item.case]
        count = executed(disassemble(compile_case(case, ARCHITECTURES["sm_90"]))[1], item.trips)
        yield (
            f"| {item.case} | {item.channels * 2 * TOKENS / BYTES_PER_SECOND * 1e6:.1f} "
            f"| {2 * item.int8 * TOKENS / INT8_PER_SECOND * 1e6:.1f} "
            f"| {2 * item.float16 * TOKENS / FLOAT16_PER_SECOND * 1e6:.1f} "
            f"| {count} | {item.programs * case.num_warps * count / ISSUED_PER_SECOND * 1e6:.1f} |"
        )


def main() -> int:
    """Print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for row in rows():
        logger.info(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
