"""The choice of a kernel by device and backend, and that calls and reports make the same."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.kernels import onednn
from harmoq_ao.kernels.linear import LinearContraction
from harmoq_ao.kernels.select import (
    Backend,
    Contraction,
    UniformContraction,
    check_backend,
    preferred_family,
    select_kernel,
)
from harmoq_ao.quant.packing import pack
from harmoq_ao.triton_kernels import launch
from tests.kernels.test_onednn import make_operands
from tests.models import converted, images

CPU, GPU, OTHER = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


def _linear(**kind: float) -> Contraction:
    operands = make_operands(0, 8, 4, bits=4, **kind)  # type: ignore[arg-type]
    return LinearContraction(operands, pack((operands.weight + 8).to(torch.uint8), 4), 4)


@pytest.mark.parametrize(
    ("contraction", "device", "backend", "name", "refusal"),
    [
        (_linear(), CPU, "auto", "onednn u8s8", None),
        (_linear(), CPU, "reference", "reference integer", None),
        (_linear(), CPU, "triton", "triton lowbit_linear", None),
        (_linear(), GPU, "auto", "triton lowbit_linear", None),
        (_linear(), GPU, "reference", "reference integer", None),
        (_linear(), OTHER, "auto", "reference integer", None),
        (_linear(shift=0.3), GPU, "auto", "reference integer", "mid-rise weights"),
        (UniformContraction("plain", torch.relu), CPU, "auto", "plain", None),
        (UniformContraction("plain", torch.relu), GPU, "auto", "plain", "no Triton kernel"),
    ],
)
def test_which_kernel_and_why_no_better_one(
    contraction: Contraction, device: torch.device, backend: Backend, name: str, refusal: str | None
) -> None:
    if name == "onednn u8s8" and not onednn.is_available():
        name = "float32 on integer codes"
    kernel = select_kernel(contraction, device, backend)
    assert kernel.name == name
    assert kernel.refusal is None if refusal is None else refusal in str(kernel.refusal)


def test_a_site_runs_what_its_report_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = converted("forms", HarmoqConfig(4, 4, "paper", conv_bits=8)), []

    def recorded(contraction: Contraction, device: torch.device, backend: Backend) -> object:
        ran.append(select_kernel(contraction, device, backend).name)
        return select_kernel(contraction, device, backend)

    for backend in ("auto", "reference"):
        model.use_backend(backend)
        named = model.kernels()
        with monkeypatch.context() as patch:
            patch.setattr("harmoq_ao.sites.quantized.select_kernel", recorded)
            model(images(1)[0])
        assert set(ran) == set(named.values())
        ran.clear()


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ConfigError, match="vulkan"):
        check_backend("vulkan")


@pytest.mark.parametrize(("capability", "family"), [((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_old_gpus_take_the_reference(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], family: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    launch.supported.cache_clear()
    try:
        assert preferred_family(torch.device("cuda:0"), "auto") == family
    finally:
        launch.supported.cache_clear()
    assert preferred_family(torch.device("mps"), "auto") == "reference"
