"""Programs of a model: made once for a size, dropped with its tensors, and named in the report."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.gpu_programs import program as programs
from harmoq_ao.gpu_programs.kernels import Mlp, WindowAttention
from harmoq_ao.gpu_programs.operands import Operands
from harmoq_ao.gpu_programs.program import make_program
from tests.lowering.helpers import assert_same_image
from tests.models import PER_TOKEN, converted, images


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the images that programs were made for."""
    shapes: list[tuple[int, ...]] = []

    def counted(model: object, image: Tensor, *rest: object) -> object:
        shapes.append(tuple(image.shape))
        return make_program(model, image, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(programs, "make_program", counted)
    return shapes


def test_a_program_for_each_size_and_a_new_one_for_new_weights(made: list[tuple[int, ...]]) -> None:
    """Where Triton is asked for on a CPU, the kernels' references run."""
    model = converted("SwinIR/light", HarmoqConfig(8, 8))
    image, other = images(1)[0], images(1, (16, 32))[0]
    model.use_reference()
    expected = model(image)
    model.use_backend("triton")
    assert_same_image(model(image), expected)
    model(image)
    first = model(other)
    assert made == [tuple(image.shape), tuple(other.shape)]
    site = next(s for name, s in model.sites().items() if name.endswith("attn.qkv"))
    site.codes.copy_(site.codes.flip(0))
    assert not torch.equal(model(other), first)
    assert len(made) == 3


def test_a_copy_has_programs_of_its_own(made: list[tuple[int, ...]]) -> None:
    model, image = converted("SwinIR/light", HarmoqConfig(8, 8)), images(1)[0]
    model.use_backend("triton")
    before = model(image)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(image), before)
    for site in twin.sites().values():
        if hasattr(site, "codes"):
            site.codes.copy_(site.codes.flip(0))
    assert not torch.equal(twin(image), before)
    assert torch.equal(model(image), before)


def test_sizes_share_weights() -> None:
    model, operands = converted("SwinIR/light", HarmoqConfig(8, 8)).model, Operands()
    one, other = (make_program(model, torch.empty(1, 3, 16, n), torch.bfloat16, operands) for n in (16, 32))
    kinds = (WindowAttention, Mlp)
    pairs = [[m for m in program.children() if isinstance(m, kinds)] for program in (one, other)]
    assert len(pairs[0]) == 8
    for left, right in zip(*pairs, strict=True):
        if isinstance(left, Mlp) and isinstance(right, Mlp):
            assert left.fc1 is right.fc1
        elif isinstance(left, WindowAttention) and isinstance(right, WindowAttention):
            assert left.packed is right.packed


def test_a_model_in_bfloat16_reads_and_writes_bfloat16() -> None:
    model = converted("SwinIR/light", HarmoqConfig(8, 8), torch.bfloat16)
    model.use_reference()
    expected = model(images(1)[0])
    model.use_backend("triton")
    found = model(images(1)[0])
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.01 * expected.std()


def test_a_model_that_cannot_be_followed_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = converted("SwinIR/light", HarmoqConfig(8, 8))
    model.use_backend("triton")

    conv = model.model.conv_first
    forward = type(conv).forward
    conv.forward = lambda x: forward(conv, x) if float(x.sum()) < 1e9 else x
    with caplog.at_level(logging.WARNING):
        assert model.gpu_programs.run(model.model, model.float32_twin, images(1)[0], torch.float32) is None
        assert model.gpu_programs.run(model.model, model.float32_twin, images(1)[0], torch.float32) is None
    assert [record.message for record in caplog.records if "GPU" in record.message] == [
        f"The model runs without fused GPU kernels: {model.gpu_programs.refusal}"
    ]
    assert "asks for values" in model.gpu_programs.sentence()


def test_the_report_names_the_kernels_of_a_gpu_without_one() -> None:
    model = converted("SwinIR/light", HarmoqConfig(4, 4, "paper", relative_maps=True))
    here, there = model.report(), model.report("cuda")
    assert all("triton" not in str(row.kernel) for row in here.rows)
    kernels = {row.kernel for row in there.rows if row.quantized}
    assert kernels == {"triton window_attention", "triton mlp"}
    dynamic = converted("SwinIR/light", HarmoqConfig(4, 4, rules=PER_TOKEN)).lowerings("cuda")
    assert {low.kernel for low in dynamic.values()} == {"triton lowbit_linear"}
    assert all(low.reason for low in dynamic.values())


def test_what_no_kernel_takes_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = converted("RGT", HarmoqConfig(8, 8, "paper"))
    model.use_backend("triton")
    with caplog.at_level(logging.WARNING):
        model(images(1)[0])
        model(images(1, (16, 32))[0])
    assert len([r for r in caplog.records if "no heads of windows" in r.message]) == 1
    reasons = {low.reason for low in model.lowerings("cuda").values()}
    assert any("no heads of windows" in str(reason) for reason in reasons)
