"""The coverage table: what of each architecture becomes a site, what stays float and why, and whether bits agree.

    python -m harmoq_ao.recipes.coverage            # writes docs/coverage.md

Random weights at toy size are enough: which contractions exist does not depend on either.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import harmoq_ao as h
from harmoq_ao.common.progress import track
from harmoq_ao.recipes.architectures import ARCHITECTURES, CONVOLUTIONAL, Architecture, forward
from harmoq_ao.recipes.store import write_text
from harmoq_ao.sites.report import Report

_HEAD = """# Coverage of spandrel's architectures

Made by `python -m harmoq_ao.recipes.coverage` from `recipes/architectures.py`: one small instance with random weights
for each architecture of spandrel that multiplies matrices outside convolutions, in the `paper` profile at W4A4.

*Sites* are linear layers and products of activations that depend on the image. *MACs* is the share of all
multiply-accumulates, convolutions included, that run on quantized operands; convolutions stay float unless `conv_bits`
asks for them. *Equal bits*: with fake-quantization off the prepared model gives the original's output bit for bit, at
every listed size and batch.

| architecture | sites | quantized | MACs | equal bits at sizes (batches) | stays float |
|---|--:|--:|--:|---|---|
"""


@dataclass(frozen=True)
class Coverage:
    """What was found in one architecture.

    Args:
        architecture: The entry it was found in.
        sites: Linears and products of activations that depend on the image.
        quantized: How many of them quantize.
        macs_share: Share of all multiply-accumulates on quantized operands.
        floats: Number of contractions that stay float, by kind and reason.
        unequal: Sizes and batches where the prepared model differs from the original.
        error: Why nothing could be prepared, or None.
    """

    architecture: Architecture
    sites: int = 0
    quantized: int = 0
    macs_share: float = 0.0
    floats: dict[tuple[str, str], int] = field(default_factory=dict)
    unequal: tuple[str, ...] = ()
    error: str | None = None


def cover(architecture: Architecture) -> Coverage:
    """Prepare one architecture and compare it with the original at all its sizes and batches."""
    model = architecture.build()
    config = h.HarmoqConfig(weight_bits=4, act_bits=4, profile="paper")
    examples = [architecture.example(size) for size in architecture.sizes[:2]]
    try:
        prepared = h.prepare_harmoq(model, config, examples)
    except h.HarmoqError as error:
        return Coverage(architecture, error=error.what)
    unequal = []
    for size in architecture.sizes:
        for batch in architecture.batches:
            image = architecture.example(size, batch, seed=1)
            if not torch.equal(forward(model, image), forward(prepared, image)):
                unequal.append(f"{size[0]}x{size[1]} (batch {batch})")
    report = prepared.report()  # after all sizes: other branches may bring other sites
    return Coverage(
        architecture,
        len(report.sites),
        sum(row.quantized for row in report.sites),
        report.macs_share,
        _floats(report),
        tuple(unequal),
    )


def _floats(report: Report) -> dict[tuple[str, str], int]:
    return dict(Counter((row.kind, _general(row.reason.text)) for row in report.rows if row.reason is not None))


def _general(reason: str) -> str:
    """A reason without what differs from site to site (line numbers, paths)."""
    first = reason.splitlines()[0]
    return re.sub(r"(?:[^\s()]*/)?(\w+\.py)(?::\d+)?", r"\1", first)


def markdown(found: Sequence[Coverage]) -> str:
    """The document."""
    lines = [_line(coverage) for coverage in found]
    notes = [f"* {c.architecture.name}: {c.architecture.notes}." for c in found if c.architecture.notes]
    text = _HEAD + "\n".join(lines)
    if notes:
        text += "\n\nNotes:\n\n" + "\n".join(notes)
    return f"{text}\n\nOnly convolutions (and FFTs), so no sites but convolutions: {', '.join(CONVOLUTIONAL)}.\n"


def _line(coverage: Coverage) -> str:
    name = coverage.architecture.name
    if coverage.error is not None:
        return f"| {name} | | | | | not prepared: {coverage.error} |"
    reasons = sorted(coverage.floats.items(), key=lambda item: (-item[1], item[0]))
    floats = "; ".join(f"{count} {kind}: {reason}" for (kind, reason), count in reasons)
    cells = (
        name,
        str(coverage.sites),
        str(coverage.quantized),
        f"{100 * coverage.macs_share:.0f} %",
        _equality(coverage),
        floats.replace("|", "\\|") or "nothing",
    )
    return f"| {' | '.join(cells)} |"


def _equality(coverage: Coverage) -> str:
    if coverage.unequal:
        return f"**differs** at {', '.join(coverage.unequal)}"
    entry = coverage.architecture
    sizes = ", ".join(f"{height}x{width}" for height, width in entry.sizes)
    return f"{sizes} ({', '.join(map(str, entry.batches))})"


def main() -> None:
    """Write the document."""
    parser = argparse.ArgumentParser(description="Write the coverage table.")
    parser.add_argument("--output", type=Path, default=Path("docs/coverage.md"))
    output = parser.parse_args().output
    found = [cover(architecture) for architecture in track(ARCHITECTURES, "Covering")]
    write_text(output, markdown(found))


if __name__ == "__main__":
    main()
