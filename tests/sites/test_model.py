"""Traits of prepared and saved models."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from torch import nn

from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.common.traits import ImageTraits
from harmoq_ao.runtime.upscaler import Upscaler
from harmoq_ao.sites.model import ModelTraits
from harmoq_ao.zoo import LoadedModel

STORED = {"scale": 2, "size_multiple": 8, "size_minimum": 16, "architecture": None}


OTHER = ImageTraits(
    size_multiple=8, size_minimum=16, square=True, tiling="discouraged", output="0.image", keyword="pixels"
)


def test_traits_survive_saving() -> None:
    assert not {name for name, value in OTHER.image_traits().items() if value == getattr(ImageTraits(), name)}
    for given in (OTHER, ImageTraits()):
        traits = ModelTraits(scale=2, architecture={"class": "a:B"}, **given.image_traits())
        assert ModelTraits.from_dict(json.loads(json.dumps(traits.to_dict()))) == traits


@pytest.mark.parametrize("described", [ModelTraits, LoadedModel, Upscaler])
def test_every_description_of_a_model_has_all_traits(described: type[ImageTraits]) -> None:
    names = {field.name for field in fields(described)}
    needed = {"model": nn.Identity(), "architecture": "x", "name": "x", "scale": 2, "input_channels": 3}
    needed |= {"output_channels": 3}
    made = described(**{n: v for n, v in needed.items() if n in names}, **OTHER.image_traits())
    assert made.image_traits() == OTHER.image_traits()


def test_traits_without_the_entry_of_square_images_are_what_older_versions_wrote() -> None:
    traits = ModelTraits.from_dict(STORED)
    assert not traits.square
    assert traits.to_dict() == STORED


@pytest.mark.parametrize(
    "change",
    [
        {"square": 1},
        {"square": None},
        {"tiling": "never"},
        {"output": ""},
        {"keyword": 3},
        {"scale": "2"},
        {"other": 1},
        {"architecture": 3},
    ],
)
def test_what_are_not_traits_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SavedModelError, match="traits"):
        ModelTraits.from_dict(STORED | change)
