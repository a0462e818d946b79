"""Settings shared by all tests."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("ci"), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _no_handler_of_ended_children_stays() -> Iterator[None]:
    """A data loader with workers leaves one for good, and OpenVINO an alternate signal stack that is not mapped.

    The next process that a test started and that ended took this one with it, without a word of the fault handler.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)


@pytest.fixture(scope="session", autouse=True)
def _memory_is_returned() -> Iterator[None]:
    """The command line lets its process keep what is freed; one that runs all tests would hold gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        for user in ("harmoq_ao.cli.common", "harmoq_ao.recipes.options"):
            patch.setattr(f"{user}.keep_memory", lambda: True)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


_LEVELS = {name: logging.getLogger(name).level for name in (None, "harmoq_ao", "tifffile")}
"""Before any test, and any fixture that several tests share."""


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command line sets levels and a handler for its process; other tests of the process must not meet them."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    root.handlers[:] = [one for one in root.handlers if one in handlers]
