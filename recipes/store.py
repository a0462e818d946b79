"""Files of a study: records as JSON, the state of a prepared model, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.common.output import atomic_write, make_folder
from harmoq_ao.sites.base import PreparedSite

_REMEDY = "remove the file, and the cell is computed again"


def read_json(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is no such file.

    Raises:
        SavedModelError: The file is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{path} cannot be read", found=str(error)[:200], remedy=_REMEDY) from error
    return found


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all; infinities and NaN as Python's json writes them."""
    write_text(path, json.dumps(record, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its folder is created if need be."""
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(text.encode())


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a prepared model.

    Raises:
        SavedModelError: The file is missing or damaged.
    """
    try:
        return from_safetensors(path.read_bytes())
    except Exception as error:  # safetensors raises its own kind
        raise SavedModelError(f"{path} cannot be read", found=str(error)[:200], remedy=_REMEDY) from error


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """Write the tensors of a prepared model whole or not at all."""
    with atomic_write(path) as file:
        file.write(to_safetensors(state))


def environment(device: str | torch.device) -> dict[str, Any]:
    """Versions and the kind of machine, without host names or dates."""
    found = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "harmoq_ao": h.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(names, platform.processor() or platform.machine())}, {cores} cores"


# --- the state of a prepared model ------------------------------------------------------------------------------------


def state_of(prepared: h.PreparedModel) -> dict[str, Tensor]:
    """Parameters and buffers by name, each with memory of its own; constants of traced graphs are no part of it."""
    state = prepared.model.state_dict()
    return {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}


def restore_state(prepared: h.PreparedModel, state: dict[str, Tensor]) -> None:
    """Give a freshly prepared model a stored state; parameters that it does not have yet are made.

    Raises:
        SavedModelError: The names or shapes are not those of the model.
    """
    for module in prepared.sites():
        _make_optional(module, state)
    odd = sorted(set(prepared.model.state_dict()) ^ set(state))
    if odd:
        raise SavedModelError("The stored state is not that of the model", found=f"{odd[0]} in one only")
    try:
        prepared.model.load_state_dict(state)
    except RuntimeError as error:
        raise SavedModelError("The stored state is not that of the model", found=str(error)[:300]) from error


def _make_optional(module: PreparedSite, state: dict[str, Tensor]) -> None:
    """Joint scales and the like exist where a method made them."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for name, present in list(module._parameters.items()):
        stored = state.get(f"{module.site.path}.{name}")
        if present is None and stored is not None:
            setattr(module, name, nn.Parameter(stored.to(device), requires_grad=False))
