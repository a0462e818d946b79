"""Bits by patch: the width follows the entropy, each width is the network at that width, and nothing is converted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.baselines.bits_by_patch import BitsByPatch, patch_entropy, prepare_by_patch, widths_of
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig
from tests.models import build, images


def crops_of_growing_entropy(count: int = 6) -> list[Tensor]:
    """Images `[3, 16, 16]` of 2, 4, 8, ... gray levels."""
    return [(image[0] * 2 ** (i + 1)).floor() / 2 ** (i + 1) for i, image in enumerate(images(count))]


@pytest.fixture(scope="module")
def network() -> BitsByPatch:
    return prepare_by_patch(build("SwinIR/light"), crops_of_growing_entropy(), HarmoqConfig(4, 4, "paper"))


def test_over_the_calibration_crops_widths_are_equally_frequent(network: BitsByPatch) -> None:
    network.used.clear()
    assert math.isnan(network.mean_bits)
    crops = crops_of_growing_entropy()
    assert [patch_entropy(c) for c in crops] == sorted(patch_entropy(c) for c in crops)
    for crop in crops:
        network(crop[None])
    assert network.used == {3: 2, 4: 2, 5: 2}
    assert network.mean_bits == 4


def test_each_image_of_a_batch_is_upscaled_at_its_own_width(network: BitsByPatch) -> None:
    few, *_, many = crops_of_growing_entropy()
    with torch.no_grad():
        found = network(torch.stack([few, many]))
        expected = [model.image(crop[None]) for model, crop in ((network.models[0], few), (network.models[-1], many))]
    assert torch.equal(found, torch.cat(expected))
    assert not torch.equal(network.models[0].image(many[None]), expected[1]), "widths differ"


def test_a_width_holds_at_all_sites_and_weights_keep_theirs(network: BitsByPatch) -> None:
    for width, model in zip(network.widths, network.models, strict=True):
        assert isinstance(model, h.PreparedModel)
        assert {q.spec.bits for site in model.sites() for q in site.activation_quantizers()} == {width}
        assert {q.spec.bits for site in model.sites() for q in site.weight_quantizers()} == {4}


@pytest.mark.parametrize(("bits", "widths"), [(2, [2]), (3, [2, 3, 4]), (7, [6, 7, 8]), (8, [8])])
def test_widths_average_to_the_bits(bits: int, widths: list[int]) -> None:
    assert widths_of(bits) == widths


def test_thresholds_part_the_widths(network: BitsByPatch) -> None:
    pairs = zip(network.widths, network.models, strict=True)
    models = {width: model for width, model in pairs if isinstance(model, h.PreparedModel)}
    with pytest.raises(ConfigError, match="one fewer than models"):
        BitsByPatch(models, network.thresholds[:1])
