"""What programs launch and move on a GPU, counted without one, next to the budget.

    python -m benchmarks.gpu_traces                  # every architecture at toy size
    python -m benchmarks.gpu_traces --published      # models as published at 256x256, and masks at 2048x2048: minutes

Random weights, W8A8 in the `deploy` profile. Counts say what is asked of a GPU, not how long it takes. They are kept as
JSON lines, which the tests hold programs to, and as a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.common.progress import track
from harmoq_ao.gpu_programs.counting import Count, count_program
from harmoq_ao.gpu_programs.operands import Operands
from harmoq_ao.gpu_programs.program import make_program
from harmoq_ao.programs.record import Unrecordable
from harmoq_ao.recipes.architectures import ARCHITECTURES
from harmoq_ao.recipes.store import write_text

RESULTS = Path("benchmarks/results/gpu_traces.jsonl")
PUBLISHED = Path("benchmarks/results/gpu_traces_published.jsonl")
TABLE = Path("docs/results/gpu_traces.md")
KINDS = ("WindowAttention", "AttentionCore", "ChannelAttention", "Mlp")
_SIDE, _LARGE = 256, 2048


@dataclass(frozen=True)
class Published:
    """A model as published.

    Attributes:
        name: As in the table.
        architecture: Of spandrel.
        arguments: Of its constructor.
        budget: Most launches and most bytes of a forward, where there is one.
    """

    name: str
    architecture: str
    arguments: dict[str, Any]
    budget: tuple[int, float] | None = None


MODELS = (
    Published(
        "SwinIR-light x2",
        "SwinIR",
        {
            "upscale": 2, "img_size": 64, "window_size": 8, "img_range": 1.0, "depths": [6] * 4, "embed_dim": 60,
            "num_heads": [6] * 4, "mlp_ratio": 2, "upsampler": "pixelshuffledirect",
        },
        (60, 1.0e9),
    ),
    Published(
        "Swin2SR-light x2",
        "Swin2SR",
        {
            "upscale": 2, "img_size": 64, "window_size": 8, "img_range": 1.0, "depths": [6] * 4, "embed_dim": 60,
            "num_heads": [6] * 4, "mlp_ratio": 2, "upsampler": "pixelshuffledirect",
        },
    ),
    Published(
        "HAT-S x2",
        "HAT",
        {
            "upscale": 2, "img_size": 64, "window_size": 16, "compress_ratio": 24, "squeeze_factor": 24,
            "conv_scale": 0.01, "overlap_ratio": 0.5, "img_range": 1.0, "depths": [6] * 6, "embed_dim": 144,
            "num_heads": [6] * 6, "mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv",
        },
    ),
    Published(
        "DRCT x2",
        "DRCT",
        {
            "upscale": 2, "img_size": 64, "window_size": 16, "img_range": 1.0, "depths": [6] * 6, "embed_dim": 180,
            "num_heads": [6] * 6, "gc": 32, "mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv",
        },
    ),
    Published(
        "DAT-light x2",
        "DAT",
        {
            "upscale": 2, "img_size": 64, "img_range": 1.0, "depth": [18], "embed_dim": 60, "num_heads": [6],
            "expansion_factor": 2, "resi_connection": "3conv", "split_size": [8, 32], "upsampler": "pixelshuffledirect",
        },
    ),
)  # fmt: skip


def converted(model: nn.Module, example: Tensor) -> h.QuantizedModel:
    """The model in W8A8, calibrated on one image."""
    prepared = h.prepare_harmoq(model, h.HarmoqConfig(8, 8), [example])
    return h.convert_harmoq(h.calibrate(prepared, [example], show_progress=False))


def entry(name: str, dtype: torch.dtype, count: Count) -> dict[str, Any]:
    """A count as a JSON line."""
    islands = {kind: count.fused[kind] for kind in KINDS if count.fused[kind]}
    numbers = {"launches": count.launches, "moved": count.moved, "masks": count.masks}
    return {"name": name, "dtype": str(dtype).removeprefix("torch."), "islands": islands, **numbers}


def counted(name: str, model: h.QuantizedModel, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Make a program and count it."""
    program = make_program(model.model, torch.empty(shape, device="meta"), dtype, Operands())
    return entry(name, dtype, count_program(program, shape))


def toys() -> Iterator[dict[str, Any]]:
    """Every architecture at toy size; the reason where none is followed."""
    for architecture in track(ARCHITECTURES, "Counting"):
        example = architecture.example()
        try:
            model = converted(architecture.build(), example)
        except ConfigError:
            yield {"name": architecture.name, "refused": "nothing in it is quantized in `deploy`"}
            continue
        for dtype in (torch.bfloat16, torch.float32):
            try:
                yield counted(architecture.name, model, tuple(example.shape), dtype)
            except Unrecordable as refusal:
                yield {"name": architecture.name, "refused": str(refusal)}
                break


def published() -> Iterator[dict[str, Any]]:
    """Models as published, and the first of them at a large size, for its masks; what is kept is not counted again."""
    known = {line["name"]: line for line in load(PUBLISHED)} if PUBLISHED.exists() else {}
    sized = [*((item, _SIDE) for item in MODELS), (MODELS[0], _LARGE)]
    for item, side in track(sized, "Counting"):
        name = item.name if side == _SIDE else f"{item.name}, {side}x{side}"
        yield (
            known[name]
            if name in known
            else {**_counted(item, name, side), "budget": item.budget if side == _SIDE else None}
        )


def _counted(item: Published, name: str, side: int) -> dict[str, Any]:
    torch.manual_seed(0)
    constructor = getattr(import_module(f"spandrel.architectures.{item.architecture}"), item.architecture)
    model = converted(constructor(**item.arguments).eval(), torch.rand(1, 3, 64, 64))
    return counted(name, model, (1, 3, side, side), torch.bfloat16)


def keep(lines: Iterator[dict[str, Any]], path: Path) -> None:
    """Write JSON lines, each when it is there."""
    kept = ""
    for line in lines:
        kept += json.dumps(line) + "\n"
        write_text(path, kept)


def load(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The kept lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table() -> str:
    """The document."""
    head = (
        "# Launches and bytes of GPU programs\n\n"
        "Counted on tensors without values by `python -m benchmarks.gpu_traces` (toy sizes) and `--published` (models\n"
        "as published, 256x256); no GPU was used. W8A8, `deploy`, bfloat16. A launch is an operator that makes a\n"
        "tensor. Windows of more than 64 tokens or 128 channels are three of ours: qkv, attention, projection;\n"
        "attention among channels is three too: sums, maps, product. Bytes are those of operands and results, each\n"
        "once.\n"
    )
    kinds = "window attention | attention | among channels | MLP"
    columns = f"| model | {kinds} | launches | MB moved | MB of masks | budget |\n"
    rule = "|---|--:|--:|--:|--:|--:|--:|--:|---|\n"
    body = ""
    for title, path in (("As published", PUBLISHED), ("Toy sizes", RESULTS)):
        if path.exists():
            body += f"\n## {title}\n\n{columns}{rule}" + "".join(map(_row, load(path)))
    return head + body


def _row(line: dict[str, Any]) -> str:
    if line.get("dtype") == "float32":
        return ""
    if "refused" in line:
        return f"| {line['name']} | | | | | | | | runs as it is: {line['refused']} |\n"
    budget = line.get("budget")
    allowed = "" if budget is None else f"{budget[0]} launches, {budget[1] / 1e6:.0f} MB"
    kinds = [str(line["islands"].get(kind, "")) for kind in KINDS]
    numbers = [str(line["launches"]), f"{line['moved'] / 1e6:.1f}", f"{line['masks'] / 1e6:.2f}"]
    return f"| {' | '.join([line['name'], *kinds, *numbers, allowed])} |\n"


def main() -> None:
    """Count, keep, and write the table."""
    parser = argparse.ArgumentParser(description="Count launches and bytes of GPU programs, without a GPU.")
    parser.add_argument("--published", action="store_true", help="models as published, at 256x256")
    work: tuple[Callable[[], Iterator[dict[str, Any]]], Path] = (toys, RESULTS)
    if parser.parse_args().published:
        work = published, PUBLISHED
    keep(work[0](), work[1])
    write_text(TABLE, table())


if __name__ == "__main__":
    main()
