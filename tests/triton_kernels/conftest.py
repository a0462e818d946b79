"""Kernels run in Triton's interpreter. Tests of compiled code compile in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.triton_kernels.interpreter import interpreted


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreted():
        yield
