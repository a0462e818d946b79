"""What every architecture launches on a GPU, counted without one, and what the launched operators compute."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import harmoq_ao as h
from benchmarks.gpu_traces import PUBLISHED, entry, load
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.gpu_programs.counting import Count, count_program
from harmoq_ao.gpu_programs.operands import Operands
from harmoq_ao.gpu_programs.program import make_program
from tests import models

KEPT = {(line["name"], line["dtype"]): line for line in load() if "refused" not in line}
FOLLOWED = sorted({name for name, _ in KEPT})

#: Largest difference from plain integers, in units of the range of the image.
EXACT, HALF = 1e-2, 2e-2
#: Likewise on average: codes next to a boundary may move to the other side.
MEAN = {torch.float32: 1e-3, torch.bfloat16: 2e-3}


@cache
def quantized(name: str, profile: str) -> tuple[h.QuantizedModel, Tensor, Tensor]:
    """A converted small instance, an image, and its output by plain integers."""
    architecture, config = models.entry(name), HarmoqConfig(8, 8, profile)
    example = architecture.example()
    # Of one size, products over all pixels would be given a joint scale for each.
    examples = [example] if profile == "deploy" else [example, architecture.example(architecture.sizes[1])]
    prepared = h.prepare_harmoq(models.build(name), config, examples)
    model = h.convert_harmoq(h.calibrate(prepared, examples, show_progress=False))
    model.use_reference()
    with torch.no_grad():
        expected: Tensor = model(example)
    model.use_backend("auto")
    return model, example, expected


def counted(name: str, profile: str, dtype: torch.dtype) -> Count:
    """The count of a program whose output on the CPU is that of plain integers."""
    model, image, expected = quantized(name, profile)
    program = make_program(model.model, image, dtype, Operands())
    difference = (program(image) - expected).abs() / (expected.max() - expected.min())
    assert float(difference.max()) < (EXACT if dtype is torch.float32 else HALF)
    assert float(difference.mean()) < MEAN[dtype]
    return count_program(program, tuple(image.shape))


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_architecture_is_as_in_the_table(name: str, dtype: torch.dtype) -> None:
    """`python -m benchmarks.gpu_traces` counts anew; more launches or bytes, or other islands, are to be explained."""
    count = counted(name, "deploy", dtype)
    found, kept = entry(name, dtype, count), KEPT[name, str(dtype).removeprefix("torch.")]
    assert found["islands"] == kept["islands"]
    assert found["launches"] <= kept["launches"]
    assert found["moved"] <= kept["moved"]
    assert {t for types in count.types.values() for t in types} <= {dtype}


@pytest.mark.parametrize("name", ["SwinIR/light", "Swin2SR", "HAT", "DRCT", "DAT/light", "RGT", "CRAFT", "GRL", "FDAT"])
def test_quantized_products_are_fused_alike(name: str) -> None:
    count = counted(name, "paper", torch.bfloat16)
    assert entry(name, torch.bfloat16, count)["islands"] == KEPT[name, "bfloat16"]["islands"]


def test_the_published_models_keep_their_budget() -> None:
    lines = {line["name"]: line for line in load(PUBLISHED)}
    swinir = lines["SwinIR-light x2"]
    assert swinir["islands"] == {"WindowAttention": 24, "Mlp": 24}
    assert swinir["launches"] <= 60
    assert swinir["moved"] <= 1e9
    assert lines["SwinIR-light x2, 2048x2048"]["masks"] < 16e6
    hat = lines["HAT-S x2"]
    assert hat["islands"] == {"AttentionCore": 42, "Mlp": 42}
    assert hat["launches"] <= 400  # 10 of a block with channel attention, 4 of one with overlapping windows
    assert hat["moved"] <= 16.7e9
    assert lines["DRCT x2"]["islands"]["AttentionCore"] == 30
    assert lines["DRCT x2"]["launches"] <= 222
    assert lines["DAT-light x2"]["islands"] == {"AttentionCore": 18, "ChannelAttention": 9}
    assert lines["DAT-light x2"]["launches"] <= 386
