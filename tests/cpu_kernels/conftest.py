"""Fixtures of the C++ kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from tests.cpu_kernels.helpers import OF_THIS_CPU, built


@pytest.fixture(params=OF_THIS_CPU, scope="module")
def operators(request: pytest.FixtureRequest) -> ModuleType:
    """The operators of one instruction set after the other."""
    return built(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Back to the number of threads that there was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
