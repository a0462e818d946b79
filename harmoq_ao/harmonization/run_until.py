"""Forward passes that a hook ends as soon as it has seen enough."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn


class _StopForward(Exception):  # noqa: N818  (control flow, not an error)
    """Travels from :func:`stop_forward` to :func:`run_until_stopped`."""


def stop_forward() -> NoReturn:
    """End the forward pass that :func:`run_until_stopped` runs; to be called in a hook of one of its modules."""
    raise _StopForward


def run_until_stopped(model: nn.Module, image: Tensor) -> bool:
    """Run `model` on an image batch until a hook calls :func:`stop_forward`.

    Returns:
        Whether a hook did; False after a complete forward pass.
    """
    try:
        model(image)
    except _StopForward:
        return True
    return False
