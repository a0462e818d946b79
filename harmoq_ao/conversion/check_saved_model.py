"""The checks that a saved model must pass: its config, the weights file, and every tensor; nothing in it is trusted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from torch import Tensor, nn

from harmoq_ao.common.errors import SavedModelError, shown
from harmoq_ao.common.files import FOLDER, NOTHING, check_file, found_at
from harmoq_ao.conversion.format import (
    CONFIG_NAME,
    FORMAT,
    MAX_CONFIG_BYTES,
    OLDEST_VERSION,
    REMEDY,
    SCHEMA_VERSION,
    WEIGHTS_NAME,
    canonical_json,
)


def read_tensors(folder: Path, weights: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of the weights file, once its name and its SHA-256 are those of the config."""
    name = weights["file"]
    path = folder / name
    if not WEIGHTS_NAME.fullmatch(name):
        raise SavedModelError(
            f"{folder} names no weights file",
            found=shown(name),
            expected="model-<12 digits>.safetensors",
        )
    check_file(path, SavedModelError, "the weights of a saved model", _MAX_WEIGHTS_BYTES)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SavedModelError(f"{path} cannot be read", found=error.strerror, remedy=REMEDY) from error
    if hashlib.sha256(data).hexdigest() != weights["sha256"]:
        raise SavedModelError(f"{path} is damaged", found=f"{len(data)} bytes of another SHA-256", remedy=REMEDY)
    try:
        return from_safetensors(data)
    except Exception as error:  # types that this torch does not know, too
        raise SavedModelError(f"{path} is not a safetensors file", found=str(error)[:200], remedy=REMEDY) from error


def check_tensor(name: str, tensor: Tensor, target: Tensor, of_site: bool) -> None:
    """Whether a stored tensor fits its place in the model.

    Args:
        name: Its name in the model's state.
        tensor: What is stored.
        target: The parameter or buffer it goes to.
        of_site: The target belongs to a quantized site, whose values are checked too.

    Raises:
        SavedModelError: Another shape or type, not finite, or a scale that is not positive.
    """
    if tensor.shape != target.shape:
        raise SavedModelError(
            f"{name} has the wrong shape", found=tuple(tensor.shape), expected=tuple(target.shape), remedy=REMEDY
        )
    if tensor.is_floating_point() != target.is_floating_point() or (
        not tensor.is_floating_point() and tensor.dtype != target.dtype
    ):
        raise SavedModelError(f"{name} has the wrong type", found=tensor.dtype, expected=target.dtype, remedy=REMEDY)
    if isinstance(target, nn.Parameter) or of_site:
        _check_values(name, tensor)


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    if not bool(torch.isfinite(tensor).all()):
        raise SavedModelError(f"{name} is not finite", found="NaN or infinity", remedy=REMEDY)
    kind = name.rpartition(".")[2]
    positive = tensor if kind in ("weight_scale", "joint_scale") else tensor[:1] if kind.endswith("_bounds") else None
    if positive is not None and not bool((positive > 0).all()):
        raise SavedModelError(f"{name} must be positive", found=float(positive.min()), remedy=REMEDY)


MAX_EXAMPLE_VALUES = 1 << 22
"""Of one example batch: a load runs the model on it."""


_MAX_WEIGHTS_BYTES = 4 << 30


_MAX_DB = 1e4


_WEIGHTS_FIELDS = ("file", "sha256", "layout")


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a saved model, without its check sum; the form of every entry is right, its meaning is not checked.

    Raises:
        SavedModelError: No saved model, another format or version, a changed byte, or an entry of the wrong form.
    """
    path = folder / CONFIG_NAME
    try:
        if found_at(path) == NOTHING:
            at = found_at(folder)
            raise SavedModelError(
                f"{folder} is not a saved model",
                found=f"a folder without {CONFIG_NAME}" if at == FOLDER else at,
                expected="a folder written by save_quantized",
            )
        check_file(path, SavedModelError, "the config of a saved model", MAX_CONFIG_BYTES)
        config = json.loads(path.read_bytes())
        # Written out here, since Python may refuse to (integers of many digits, deep nesting) what it has just read.
        body = canonical_json({k: v for k, v in config.items() if k != "sha256"}) if isinstance(config, dict) else b""
    except SavedModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise SavedModelError(f"{path} cannot be read", found=str(error)[:200], remedy=REMEDY) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SavedModelError(f"{path} is of another format", expected=f'"format": "{FORMAT}"')
    version = config.get("schema_version")
    if type(version) is not int or not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        raise SavedModelError(
            f"{path} is of another version of the format",
            found=shown(version),
            expected=f"{OLDEST_VERSION} to {SCHEMA_VERSION}",
            remedy="use the version of harmoq-ao that wrote it",
        )
    if config.pop("sha256", None) != hashlib.sha256(body).hexdigest():
        raise SavedModelError(f"{path} was changed after it was saved", found="another SHA-256", remedy=REMEDY)
    _check_fields(path, config)
    return config


def _is_db(value: Any) -> bool:
    return type(value) in (int, float) and -_MAX_DB <= value <= _MAX_DB


def _check_fields(path: Path, config: dict[str, Any]) -> None:
    kinds: dict[str, Callable[[Any], bool]] = {
        "quantization_config": lambda v: isinstance(v, dict),
        "float_dtype": lambda v: v in ("float32", "bfloat16"),
        "traits": lambda v: isinstance(v, dict),
        "example_shapes": are_example_shapes,
        "weights": lambda v: isinstance(v, dict) and all(isinstance(v.get(k), str) for k in _WEIGHTS_FIELDS),
    }
    if config["schema_version"] == OLDEST_VERSION:
        kinds["sqnr_db"] = lambda v: isinstance(v, dict) and all(x is None or _is_db(x) for x in v.values())
    else:
        kinds["found"] = lambda v: isinstance(v, dict)
    for name, valid in kinds.items():
        if name not in config or not valid(config[name]):
            raise SavedModelError(f"{path} has no valid {name!r}", found=shown(config.get(name)), remedy=REMEDY)


def are_example_shapes(value: Any) -> bool:
    """Whether these are one to four shapes `[B, C, H, W]` of batches that a load can run."""

    def fits(shape: Any) -> bool:
        whole = isinstance(shape, list) and len(shape) == 4 and all(type(n) is int for n in shape)
        return whole and min(shape) > 0 and math.prod(shape) <= MAX_EXAMPLE_VALUES

    return isinstance(value, list) and 1 <= len(value) <= 4 and all(fits(shape) for shape in value)
