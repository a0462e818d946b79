"""The API reference is what the docstrings say today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import harmoq_ao

pytest.importorskip("griffe2md", reason="the generator of the reference is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def words(text: str) -> list[str]:
    """Layout may differ between versions of the generator, words may not."""
    return re.findall(r"\w+", text)


def test_the_committed_page_is_current() -> None:
    from harmoq_ao.recipes.api_reference import reference_text

    assert words(PAGE.read_text()) == words(reference_text()), (
        "run python -m harmoq_ao.recipes.api_reference docs/api.md"
    )


def test_every_public_name_is_there() -> None:
    page = PAGE.read_text()
    for name in harmoq_ao.__all__:
        assert f"### `{name}`" in page
    assert "Raises" in page
    assert ":class:" not in page
    assert "](#" not in page
