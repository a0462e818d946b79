"""What a site knows of itself: where it stands, and which joint vectors are defined for it."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.common.errors import KernelError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.sites.site import Site

LINEAR = Site("blocks.0.fc1", "blocks.0.fc1", "linear", (8, 4))
SCORES = Site("blocks.0.attn::matmul_0", "blocks.0.attn.harmoq_matmul_0", "matmul", (4,), "query-key")
VALUES = Site("blocks.0.attn::matmul_1", "blocks.0.attn.harmoq_matmul_1", "matmul", (16,), "attention-value")
PIXELS = Site("blocks.0.ca::matmul_0", "blocks.0.ca.harmoq_matmul_0", "matmul", (0,), "query-key")
CONV = Site("head", "head", "conv2d", (8, 3, 3, 3))
W4A4 = HarmoqConfig(weight_bits=4, act_bits=4, profile="paper", conv_bits=4, relative_maps=True)


def test_functional_sites_belong_to_the_module_of_the_call() -> None:
    assert [s.is_functional for s in (LINEAR, SCORES)] == [False, True]
    assert SCORES.module_name == "blocks.0.attn"
    assert LINEAR.module_name == "blocks.0.fc1"


@pytest.mark.parametrize(
    ("site", "scale", "shift", "relative"),
    [
        (LINEAR, True, True, False),
        (SCORES, True, False, False),
        (VALUES, False, False, True),
        (PIXELS, False, False, False),  # its length depends on the image
        (CONV, False, False, False),
    ],
    ids=lambda value: value.name if isinstance(value, Site) else None,
)
def test_which_vectors_are_defined(site: Site, scale: bool, shift: bool, relative: bool) -> None:
    settings = W4A4.settings(site.name, site.kind)
    assert site.wants_joint_scale(settings) is scale
    assert site.wants_joint_shift(settings) is shift
    assert site.wants_relative_map(settings) is relative


def test_eight_bits_have_no_shift_and_one_float_operand_has_no_scale() -> None:
    assert not LINEAR.wants_joint_shift(HarmoqConfig().settings(LINEAR.name, "linear"))
    half = HarmoqConfig(weight_bits=32, act_bits=4).settings(LINEAR.name, "linear")
    assert not LINEAR.wants_joint_scale(half)


def test_the_contracted_length_is_that_of_the_joint_scale() -> None:
    SCORES.check_length(torch.zeros(2, 16, 4), torch.ones(4))
    SCORES.check_length(torch.zeros(2, 16, 9), None)
    with pytest.raises(KernelError, match="another length than in calibration") as caught:
        SCORES.check_length(torch.zeros(2, 16, 9), torch.ones(4))
    assert "two image sizes" in str(caught.value.remedy)
