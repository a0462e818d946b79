"""Super-resolution models of the package transformers: from a folder, and from a description as of spandrel's models.

The package is not needed for anything else. No code of a folder is run: its config is a table of numbers and names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmoq_ao.common.errors import CheckpointError
from harmoq_ao.common.files import check_file
from harmoq_ao.zoo.file_kinds import config_of

CLASSES = {"Swin2SRForImageSuperResolution": "Swin2SRConfig"}
"""Models from image to image, and the configurations that they are built from."""
_MOST_REFERENCE = 1 << 10  # bytes
_MOST_BYTES = 16 << 30
_READ_SUFFIXES = (".json", ".safetensors", ".bin")


def hub_snapshot(folder: Path) -> Path:
    """The newest snapshot in a folder of the hub's cache (``models--owner--name``); any other folder itself."""
    reference = folder / "refs" / "main"
    try:
        check_file(reference, CheckpointError, "the name of a revision", _MOST_REFERENCE)
        revision = reference.read_text().strip()
    except (CheckpointError, OSError, ValueError):
        return folder
    snapshot = folder / "snapshots" / revision
    return snapshot if snapshot.is_dir() else folder


def is_transformers_model(folder: Path) -> bool:
    """Whether a folder holds a model of transformers that maps an image to an image."""
    return _class_of(folder) is not None


def reads_as_quantized(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder to be read as a saved quantized model: it holds no model of transformers."""
    return os.path.isdir(path) and not is_transformers_model(hub_snapshot(Path(path)))


def _class_of(folder: Path) -> str | None:
    architectures = config_of(folder).get("architectures")
    named = architectures if isinstance(architectures, list) else []
    return next((name for name in named if isinstance(name, str) and name in CLASSES), None)


def load_transformers(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a folder that `save_pretrained` wrote, and what :class:`LoadedModel` says of it.

    Raises:
        CheckpointError: transformers is not installed, or the folder does not fit it or holds files of other kinds.
    """
    for file in folder.iterdir():  # transformers opens those that it knows
        if file.suffix in _READ_SUFFIXES:
            check_file(file, CheckpointError, "a file of a model", _MOST_BYTES)
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError(
            f"{folder} is a model of transformers, which is not installed",
            expected="the package transformers",
            remedy="pip install transformers",
        )
    name = _class_of(folder)
    assert name is not None
    cls = getattr(importlib.import_module("transformers"), name)
    try:
        model, report = cls.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever the files lead it to
        raise CheckpointError(
            f"The model in {folder} cannot be loaded by transformers",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="download it again",
        ) from error
    lacking = sorted(report["missing_keys"])
    if lacking:  # they would be random numbers
        raise CheckpointError(
            f"The weights in {folder} are not complete", found=f"{len(lacking)} missing, such as {lacking[0]}"
        )
    config = model.config
    return model.eval(), {
        "architecture": name,
        "scale": int(config.upscale),
        "input_channels": int(config.num_channels),
        "output_channels": int(config.num_channels_out),
        "size_multiple": int(config.window_size * config.patch_size),  # its own padding misses the unembedding
        "output": "reconstruction",
    }


def hyperparameters_of(model: nn.Module) -> dict[str, Any]:
    """What the configuration of a model says of its architecture alone."""
    config = model.config
    return {name: getattr(config, name) for name in _own_fields(type(config))}


def _own_fields(config: type[Any]) -> list[str]:
    base = importlib.import_module("transformers").PretrainedConfig
    return [f.name for f in fields(config) if f.init and f.name not in {g.name for g in fields(base)}]


def transformers_class(name: str) -> tuple[type[nn.Module], type[Any], list[str]]:
    """A class of :data:`CLASSES`, the one of its configuration, and the names of its hyperparameters.

    Raises:
        ImportError: transformers is not installed.
        AttributeError: This version has no such class.
    """
    package = importlib.import_module("transformers")
    config = getattr(package, CLASSES[name])
    return getattr(package, name), config, _own_fields(config)


def transformers_version() -> str:
    """Version of the installed transformers."""
    return importlib.metadata.version("transformers")
