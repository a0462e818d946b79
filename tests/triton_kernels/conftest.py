"""Kernels run in Triton's interpreter unless a test takes the fixture away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.triton_kernels.interpreter import interpreted


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    if "compiles" in request.keywords:
        yield
        return
    with interpreted():
        yield
