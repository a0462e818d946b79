"""The table of fused kernels in docs/kernels.md: what each architecture gets on a GPU, and why not more.

    python -m harmoq_ao.recipes.lowering            # rewrites the table in docs/kernels.md

The same small instances as in the coverage table, in the `paper` profile; no GPU is needed.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import harmoq_ao as h
from harmoq_ao.common.errors import InputError
from harmoq_ao.common.progress import track
from harmoq_ao.recipes.architectures import ARCHITECTURES, Architecture
from harmoq_ao.recipes.store import write_text
from harmoq_ao.sites.report import Lowering

_BEGIN, _END = "<!-- python -m harmoq_ao.recipes.lowering -->\n", "<!-- end -->\n"
_HEAD = (
    "| architecture | window attention | attention | among channels | MLP "
    "| single sites, and why they are not fused |\n"
    "|---|--:|--:|--:|--:|---|\n"
)
_FUSED = ("triton window_attention", "triton attention", "triton channel_attention", "triton mlp")


def lowerings(architecture: Architecture) -> dict[str, Lowering]:
    """What computes each site of a small instance on a GPU."""
    examples = [architecture.example(size) for size in architecture.sizes[:2]]
    prepared = h.prepare_harmoq(architecture.build(), h.HarmoqConfig(8, 8, "paper"), examples)
    return h.convert_harmoq(h.calibrate(prepared, examples, show_progress=False)).lowerings("cuda")


def row(architecture: Architecture, found: Iterable[Lowering]) -> str:
    """One line of the table: numbers of sites."""
    found = list(found)
    kernels = Counter(low.kernel for low in found if low.reason is None)
    reasons = Counter(general(low.reason) for low in found if low.reason is not None)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    misses = "; ".join(f"{count}: {reason}" for reason, count in ordered) or "none"
    cells = (architecture.name, *(str(kernels[name] or "") for name in _FUSED), misses.replace("|", "\\|"))
    return f"| {' | '.join(cells)} |\n"


def general(reason: str) -> str:
    """The first line of a reason, without what differs from site to site: shapes, and where a trace failed."""
    first = reason.splitlines()[0]
    if "does not trace" in first:
        return first.partition("does not trace")[0] + "does not trace"
    return re.sub(r"\(\d[\d, ]*\)(?:, \(\d[\d, ]*\))*", "...", first)


def replaced(document: str, table: str, begin: str = _BEGIN) -> str:
    """`document` with another table between the mark that begins it and the next one that ends one.

    Raises:
        InputError: It has no marks.
    """
    before, found, rest = document.partition(begin)
    _, end, after = rest.partition(_END)
    if not found or not end:
        raise InputError("The document has no place for the table", expected=f"{begin.strip()} and {_END.strip()}")
    return before + begin + table + end + after


def main() -> None:
    """Rewrite the table."""
    parser = argparse.ArgumentParser(description="Rewrite the table of fused kernels.")
    parser.add_argument("--output", type=Path, default=Path("docs/kernels.md"))
    output = parser.parse_args().output
    rows = [row(entry, lowerings(entry).values()) for entry in track(ARCHITECTURES, "Surveying")]
    text = replaced(output.read_text(), _HEAD + "".join(rows))
    write_text(output, text)


if __name__ == "__main__":
    main()
