"""The converted model as a module: float types, copies, kernels by name, and the images it refuses."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch

from harmoq_ao.common.errors import InputError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.sites.quantized import QuantizedLinear
from tests.models import converted, prepare, run

PAPER = HarmoqConfig(8, 8, "paper", storage_dtype="float32")


def test_kernels_are_named() -> None:
    model = converted("forms", PAPER)
    fast = model.kernels()
    assert set(fast) == set(model.sites())
    model.use_reference(True)
    assert all("reference" in kernel for name, kernel in model.kernels().items() if "conv" not in name)
    model.use_reference(False)
    assert model.kernels() == fast


@pytest.mark.parametrize("name", ["forms", "FDAT"])
def test_float_parts_run_in_bfloat16_and_codes_do_not_change(name: str) -> None:
    full, half = converted(name, PAPER), converted(name, PAPER, torch.bfloat16)
    assert half.float_dtype == torch.bfloat16
    assert run(half).dtype == torch.float32
    assert (run(half) - run(full)).abs().mean() < 0.05
    for site_name, site in half.sites().items():
        for key, tensor in full.sites()[site_name].state_dict().items():
            assert torch.equal(site.state_dict()[key], tensor)
            assert site.state_dict()[key].dtype == tensor.dtype


def test_deep_copies_are_independent() -> None:
    model = converted("SwinIR/light", PAPER)
    expected = run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), expected)
    for site in twin.sites().values():
        if isinstance(site, QuantizedLinear):
            site.load_state_dict({k: torch.zeros_like(v) + 1 for k, v in site.state_dict().items()})
    assert not torch.equal(run(twin), expected)
    assert torch.equal(run(model), expected)


NO_IMAGES = (
    *(None, "image", torch.rand(3, 16)),
    *(torch.zeros(1, 3, 16, 16, dtype=dtype) for dtype in (torch.uint8, torch.int32)),
    *(torch.full((1, 3, 16, 16), float(value)) for value in ("nan", "inf")),
)
ONLY_CONVERTED_REFUSE = (torch.rand(3, 16, 16), torch.rand(1, 1, 16, 16))


@pytest.mark.parametrize(
    ("model", "image"), [*product((prepare, converted), NO_IMAGES), *product((converted,), ONLY_CONVERTED_REFUSE)]
)
def test_what_is_no_image_is_refused(model: Any, image: Any) -> None:
    with pytest.raises(InputError):
        model("linears", PAPER)(image)
