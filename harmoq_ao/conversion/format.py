"""The format of saved models: a folder with ``config.json`` and one safetensors file. Never a pickle, never code.

``config.json`` names the architecture, the configuration and the weights file, and carries the SHA-256 of itself and of
the weights: a file with a changed or missing byte is refused. Where it is known, it also says how the model was made
(:class:`History`, an optional entry that older readers skip).

Layout of the weights file: packed codes and integer buffers stand under their own names. All float tensors, of which a
transformer has many small ones, are flattened and concatenated in the order of their sorted names into one tensor per
type, ``floats.float16``, ``floats.bfloat16`` and ``floats.float32``; each goes to the smallest type that holds it
exactly. ``layout`` in the config has one letter for each name of the model's state, sorted: ``h``, ``b`` or ``f`` for
those types, ``-`` for tensors that are not stored as floats. (Named one by one, their header entries would cost more
than a 2-bit weight.)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import SavedModelError, shown

FORMAT = "harmoq-ao"
SCHEMA_VERSION = 3
CONFIG_NAME = "config.json"
WEIGHTS_NAME = re.compile(r"model-[0-9a-f]{12}\.safetensors")
LEFTOVER_NAME = re.compile(r"model-[0-9a-f]{12}\.safetensors|\.(model-|config\.json).*\.tmp")
"""Files that an interrupted save may leave: weights without a config, and temporary files."""
MAX_EXAMPLE_VALUES = 1 << 22
"""Of one example batch: a load runs the model on it."""
REMEDY = "copy the folder again, or quantize the float model anew"
FLOAT_TYPES = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32}
"""Types of stored floats by their letter in ``layout``, the smallest first."""
_MAX_CONFIG_BYTES = 16 << 20
_MAX_DB = 1e4
_WEIGHTS_FIELDS = ("file", "sha256", "layout")


# --- config.json ------------------------------------------------------------------------------------------------------


def seal(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its own SHA-256, that of its canonical form."""
    return {**config, "sha256": hashlib.sha256(canonical_json(config)).hexdigest()}


def canonical_json(config: dict[str, Any]) -> bytes:
    """The one way to write a config as bytes, so that equal configs have equal check sums."""
    return json.dumps(config, separators=(",", ":"), sort_keys=True).encode()


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a saved model, without its check sum; the form of every entry is right, its meaning is not checked.

    Raises:
        SavedModelError: No saved model, another format or version, a changed byte, or an entry of the wrong form.
    """
    path = folder / CONFIG_NAME
    try:
        if not path.is_file():
            found = "a folder without config.json" if folder.is_dir() else "no such folder"
            raise SavedModelError(
                f"{folder} is not a saved model", found=found, expected="a folder written by save_quantized"
            )
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise SavedModelError(f"{path} is too large", found=f"{path.stat().st_size} bytes", remedy=REMEDY)
        config = json.loads(path.read_bytes())
        # Written out here, since Python may refuse to (integers of many digits, deep nesting) what it has just read.
        body = canonical_json({k: v for k, v in config.items() if k != "sha256"}) if isinstance(config, dict) else b""
    except SavedModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise SavedModelError(f"{path} cannot be read", found=str(error)[:200], remedy=REMEDY) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SavedModelError(f"{path} is of another format", expected=f'"format": "{FORMAT}"')
    if config.get("schema_version") != SCHEMA_VERSION:
        raise SavedModelError(
            f"{path} is of another version of the format",
            found=shown(config.get("schema_version")),
            expected=SCHEMA_VERSION,
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
        "sqnr_db": lambda v: isinstance(v, dict) and all(x is None or _is_db(x) for x in v.values()),
        "weights": lambda v: isinstance(v, dict) and all(isinstance(v.get(k), str) for k in _WEIGHTS_FIELDS),
    }
    for name, valid in kinds.items():
        if name not in config or not valid(config[name]):
            raise SavedModelError(f"{path} has no valid {name!r}", found=shown(config.get(name)), remedy=REMEDY)


def are_example_shapes(value: Any) -> bool:
    """Whether these are one to four shapes `[B, C, H, W]` of batches that a load can run."""

    def fits(shape: Any) -> bool:
        whole = isinstance(shape, list) and len(shape) == 4 and all(type(n) is int for n in shape)
        return whole and min(shape) > 0 and math.prod(shape) <= MAX_EXAMPLE_VALUES

    return isinstance(value, list) and 1 <= len(value) <= 4 and all(fits(shape) for shape in value)


# --- the weights file -------------------------------------------------------------------------------------------------


def storable_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything of a module that could be stored, by sorted name: shared tensors once, released weights not at all."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if tensor.device.type != "meta" and id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def flatten_floats(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors of the weights file, and the layout of its floats.

    Args:
        tensors: What is to be stored, by name.
        state: From :func:`storable_state`, whose order of names the layout follows.
    """
    letters = {name: smallest_type(t) if t.is_floating_point() else "-" for name, t in tensors.items()}
    named = {name: t.contiguous() for name, t in tensors.items() if letters[name] == "-"}
    parts: dict[str, list[Tensor]] = {letter: [] for letter in FLOAT_TYPES}
    layout = ""
    for name in state:
        letter = letters.get(name, "-")
        layout += letter
        if letter != "-":
            parts[letter].append(tensors[name].to(FLOAT_TYPES[letter]).flatten())
    blobs = {_blob(letter): torch.cat(chunks) for letter, chunks in parts.items() if chunks}
    return named | blobs, layout


def unflatten_floats(file: dict[str, Tensor], layout: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`flatten_floats`, given the state of an empty model.

    Raises:
        SavedModelError: The layout or the floats are not those of the model.
    """
    blobs = {letter: file.pop(_blob(letter), torch.empty(0, dtype=dtype)) for letter, dtype in FLOAT_TYPES.items()}
    needed = dict.fromkeys(FLOAT_TYPES, 0)
    for tensor, letter in zip(state.values(), layout, strict=False):
        if letter in needed:
            needed[letter] += tensor.numel()
    fits = all(b.dtype == FLOAT_TYPES[k] and b.dim() == 1 and b.numel() == needed[k] for k, b in blobs.items())
    if len(layout) != len(state) or not set(layout) <= {*FLOAT_TYPES, "-"} or not fits:
        raise SavedModelError(
            "The stored tensors are not those of the architecture",
            found=f"{len(layout)} entries, {sum(b.numel() for b in blobs.values())} numbers",
            expected=f"{len(state)} entries, {sum(needed.values())} numbers",
            remedy="use the versions of spandrel and harmoq-ao that saved it",
        )
    tensors = dict(file)
    at = dict.fromkeys(FLOAT_TYPES, 0)
    for (name, target), letter in zip(state.items(), layout, strict=True):
        if letter != "-":
            tensors[name] = blobs[letter][at[letter] : at[letter] + target.numel()].reshape(target.shape)
            at[letter] += target.numel()
    return tensors


def _blob(letter: str) -> str:
    return f"floats.{str(FLOAT_TYPES[letter]).removeprefix('torch.')}"


def smallest_type(tensor: Tensor) -> str:
    """The letter of the smallest float type that holds the values exactly, or ``-`` where none does (float64)."""
    for letter, dtype in FLOAT_TYPES.items():
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return letter
    return "-" if tensor.dtype == torch.float64 else "f"
