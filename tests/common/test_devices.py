"""Devices by name: those that are there, and errors for all others."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.common import devices
from harmoq_ao.common.devices import device_named
from harmoq_ao.common.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(
    "text", ["meta", "gpu", "", "CUDA", "cuda:", "cuda:-1", "cuda:99999", "cpu:0", "mps", "cuda:٣"]
)
@pytest.mark.usefixtures("two_gpus")
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"Unknown device.*Expected: cpu, cuda, or cuda:0"):
        device_named(text)


@pytest.mark.usefixtures("two_gpus")
def test_what_is_there_is_found() -> None:
    assert device_named("cpu") == torch.device("cpu")
    assert device_named("cuda") == torch.device("cuda", 1)
    assert device_named("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"sees 2 GPUs\. Expected: cpu, or cuda:0 to cuda:1"):
        device_named("cuda:2")


@pytest.mark.usefixtures("two_gpus")
def test_ranks_take_the_gpu_that_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_distributed", lambda: True)
    assert device_named("cuda") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="cannot share a GPU"):
        device_named("cuda:0")


@pytest.mark.parametrize("text", ["cuda", "cuda:0"])
def test_without_a_gpu_there_is_the_cpu(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"sees 0 GPUs. Expected: cpu. What to do"):
        device_named(text)
