"""What a run of learning is of: a progress file of anything else must not be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.sites.model import PreparedModel

_DIGITS = 16  # of a check sum, in hexadecimal: it tells runs apart, and is read by people


def work_identity(
    prepared: PreparedModel,
    teacher: Teacher,
    crops: Sequence[Tensor],
    held_out: Sequence[Tensor],
    work: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that decides what learning computes, as a JSON-able table in a user's words.

    Tensors are there by check sums of their values. What calibration computed from them is not: its last digits depend
    on the number of threads, and a run may go on with another one.

    Args:
        prepared: The calibrated model.
        teacher: The float network.
        crops: Images `[C, S, S]` that are learned from.
        held_out: Images that choose the state to keep.
        work: What is done, JSON-able: method and settings by name.
    """
    return {
        "float model": prepared.fingerprint,
        "float weights": _digest(teacher.exact.model.state_dict().items()),
        "quantization": prepared.config.to_dict(),
        "calibration images": _digest_of_images(crops),
        "held-out images": _digest_of_images(held_out),
        **work,
    }


def _digest_of_images(images: Sequence[Tensor]) -> str:
    return f"{len(images)}, {_digest((str(index), image) for index, image in enumerate(images))}"


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Check sum of names, types, shapes and values; released tensors have no values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]
