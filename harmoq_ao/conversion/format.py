"""The format of saved models: a folder with ``config.json`` and one safetensors file. Never a pickle, never code.

``config.json`` names the architecture, the configuration and the weights file, and carries the SHA-256 of itself and of
the weights: a file with a changed or missing byte is refused. ``found`` holds what preparing the model found out by
running it (``found_format.py``). Where it is known, the config also says how the model was made (:class:`History`, an
optional entry).

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
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.sites.base import PreparedSite

FORMAT = "harmoq-ao"
SCHEMA_VERSION = 5
OLDEST_VERSION = 3
"""The oldest that is read: it lacks what the preparation found, so that loading prepares the model anew."""
CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 << 20
WEIGHTS_NAME = re.compile(r"model-[0-9a-f]{12}\.safetensors")
LEFTOVER_NAME = re.compile(r"model-[0-9a-f]{12}\.safetensors|\.(model-|config\.json).*\.tmp")
"""Files that an interrupted save may leave: weights without a config, and temporary files."""
REMEDY = "copy the folder again, or quantize the float model anew"
FLOAT_TYPES = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32}
"""Types of stored floats by their letter in ``layout``, the smallest first."""


def seal(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its own SHA-256, that of its canonical form."""
    return {**config, "sha256": hashlib.sha256(canonical_json(config)).hexdigest()}


def canonical_json(config: dict[str, Any]) -> bytes:
    """The one way to write a config as bytes, so that equal configs have equal check sums."""
    return json.dumps(config, separators=(",", ":"), sort_keys=True).encode()


# --- the weights file -------------------------------------------------------------------------------------------------


def storable_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything of a converted model that could be stored, by sorted name.

    Shared tensors come once, released weights and sites that were met only after preparation not at all.
    """
    late = {id(p) for m in model.modules() if isinstance(m, PreparedSite) for p in _observed(m)}
    kept: dict[str, Tensor] = {}
    seen = late
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if tensor.device.type != "meta" and id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def _observed(site: PreparedSite) -> Iterator[Tensor]:
    for quantizer in site.quantizers():
        yield from (*quantizer.parameters(), *quantizer.buffers())


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
