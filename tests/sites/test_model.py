"""Traits of prepared and saved models."""

from __future__ import annotations

from typing import Any

import pytest

from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.sites.model import ModelTraits

STORED = {"scale": 2, "size_multiple": 8, "size_minimum": 16, "architecture": None}


@pytest.mark.parametrize("square", [False, True])
def test_traits_survive_saving(square: bool) -> None:
    traits = ModelTraits(2, 8, 16, {"class": "a:B"}, square)
    assert ModelTraits.from_dict(traits.to_dict()) == traits


def test_traits_without_the_entry_of_square_images_are_what_older_versions_wrote() -> None:
    traits = ModelTraits.from_dict(STORED)
    assert not traits.square
    assert traits.to_dict() == STORED


@pytest.mark.parametrize("change", [{"square": 1}, {"square": None}, {"scale": "2"}, {"other": 1}, {"architecture": 3}])
def test_what_are_not_traits_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SavedModelError, match="traits"):
        ModelTraits.from_dict(STORED | change)
