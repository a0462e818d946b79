"""A saved model, and copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import harmoq_ao as h
from tests.conversion.helpers import CONFIG, SMALL
from tests.models import converted


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that nobody changes."""
    return h.save_quantized(converted(SMALL, CONFIG), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to do anything with."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
