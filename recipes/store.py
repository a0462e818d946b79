"""A study on disk: one JSON for each finished cell and benchmark set, and the state of every quantized model.

    OUTPUT/cells/ID.SET.json        scores of one cell on one set; there means finished
    OUTPUT/states/ID.safetensors    parameters of the quantized model
    OUTPUT/states/ID.json           how it was made, written after the parameters: there means complete
    OUTPUT/failures/ID.json         why a cell could not be measured; gone once it can

Every file is written beside its place and renamed, so a killed run leaves whole files only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
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
from harmoq_ao.recipes.cells import to_plain
from harmoq_ao.sites.base import PreparedSite

_REMEDY = "remove the file, and the cell is computed again"


@dataclass(frozen=True)
class Result:
    """Scores of one cell on one set.

    Args:
        psnr_y: Mean over the images in dB.
        ssim_y: Mean over the images.
        record: Everything that was written.
    """

    psnr_y: float
    ssim_y: float
    record: dict[str, Any]

    def image(self, name: str) -> dict[str, float]:
        """``psnr_y``, ``ssim_y`` and ``seconds`` of one image."""
        found: dict[str, float] = self.record["scores"]["images"][name]
        return found


class Store:
    """The files of a study.

    Args:
        output: Folder; created if need be.

    Raises:
        OutputError: The folder cannot be created.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        for folder in ("cells", "states", "failures", "pictures"):
            make_folder(output / folder)

    def result(self, identity: str, set_name: str, converted: bool = False) -> Result | None:
        """What was measured, or None."""
        record = self._read(self._result_path(identity, set_name, converted))
        if record is None:
            return None
        mean = record["scores"]["mean"]
        return Result(mean["psnr_y"], mean["ssim_y"], record)

    def keep_result(self, identity: str, set_name: str, record: dict[str, Any], converted: bool = False) -> None:
        """Write what was measured."""
        write_json(self._result_path(identity, set_name, converted), record)

    def state(self, identity: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Parameters of a quantized model and the record of its making, or None."""
        record, path = self.making(identity), self._path("states", identity, "safetensors")
        if record is None or not path.is_file():
            return None
        try:
            return from_safetensors(path.read_bytes()), record
        except Exception as error:  # safetensors raises its own kind
            raise SavedModelError(f"{path} cannot be read", found=str(error)[:200], remedy=_REMEDY) from error

    def making(self, identity: str) -> dict[str, Any] | None:
        """The record of a quantized model's making (settings, seconds, traces), or None."""
        return self._read(self._path("states", identity, "json"))

    def keep_state(self, identity: str, state: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write a quantized model; the record last. Pictures of an earlier one are removed."""
        self._path("states", identity, "json").unlink(missing_ok=True)
        for picture in (self.output / "pictures").glob(f"{identity}.*"):
            picture.unlink()
        with atomic_write(self._path("states", identity, "safetensors")) as file:
            file.write(to_safetensors(state))
        write_json(self._path("states", identity, "json"), record)

    def checkpoint(self, identity: str, settings: dict[str, Any]) -> Path:
        """Where a long refinement with these settings may keep its progress."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return self._path("states", f"{identity}-{digest}", "refining")

    def keep_failure(self, identity: str, record: dict[str, Any]) -> None:
        """Write why a cell failed."""
        write_json(self._path("failures", identity, "json"), record)

    def forget_failure(self, identity: str) -> None:
        """The cell has succeeded."""
        self._path("failures", identity, "json").unlink(missing_ok=True)

    def failure(self, identity: str) -> dict[str, Any] | None:
        """Why a cell failed, or None."""
        return self._read(self._path("failures", identity, "json"))

    def picture(self, identity: str, set_name: str, image: str, converted: bool = False) -> Path:
        """Where an upscaled image is kept."""
        return self._path("pictures", f"{identity}.{set_name}.{image}" + (".converted" if converted else ""), "png")

    def _result_path(self, identity: str, set_name: str, converted: bool) -> Path:
        return self._path("cells", f"{identity}.{set_name}" + (".converted" if converted else ""), "json")

    def _path(self, folder: str, name: str, suffix: str) -> Path:
        return self.output / folder / f"{name}.{suffix}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SavedModelError(f"{path} cannot be read", found=str(error)[:200], remedy=_REMEDY) from error
        return found


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record; infinities and NaN as Python's json does."""
    with atomic_write(path) as file:
        file.write((json.dumps(to_plain(record), indent=1) + "\n").encode())


def environment(device: str) -> dict[str, Any]:
    """Versions and the kind of machine, without names or dates."""
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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = f"{len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else f"{os.cpu_count()} cores"
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores}"


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
