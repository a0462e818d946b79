"""Writing a quantized model to a folder: all of it, or nothing.

The weights are written first and the config that names them last, by a rename, so an interrupted save leaves the model
that was there before. What the constructor of the architecture recomputes (masks, index tables) is not stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from harmoq_ao.common.errors import OutputError, SavedModelError
from harmoq_ao.common.output import atomic_write, check_output_folder, make_folder
from harmoq_ao.common.version import __version__
from harmoq_ao.conversion.check_saved_model import MAX_EXAMPLE_VALUES, are_example_shapes
from harmoq_ao.conversion.format import (
    CONFIG_NAME,
    FLOAT_TYPES,
    FORMAT,
    LEFTOVER_NAME,
    MAX_CONFIG_BYTES,
    SCHEMA_VERSION,
    canonical_json,
    flatten_floats,
    seal,
    smallest_type,
    storable_state,
)
from harmoq_ao.conversion.found_format import description_of
from harmoq_ao.conversion.load import assembled
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.graph import same_values
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.zoo.architectures import build_architecture

logger = logging.getLogger(__name__)

_MOST_CHECKED = 1 << 18
"""Values of an example image that a save runs."""


def save_quantized(model: QuantizedModel, path: str | Path) -> Path:
    """Save a quantized model to a folder.

    Args:
        model: From :func:`convert_harmoq`.
        path: Folder; created, or replaced if it holds a saved model.

    Returns:
        The folder.

    Raises:
        OutputError: The folder cannot be written, or holds other files. A model saved there before is untouched.
        SavedModelError: Not a converted model, one prepared on examples too large to be run again, or one that would
            not compute the same once it is loaded, because a module of it is not what its architecture builds.
    """
    if not isinstance(model, QuantizedModel):
        raise SavedModelError(
            "save_quantized takes a converted model", found=type(model).__name__, remedy="call convert_harmoq first"
        )
    folder = Path(path)
    if not are_example_shapes([list(shape) for shape in model.example_shapes]):
        raise SavedModelError(
            "The model was prepared on examples that are too large to be run again where a load has to",
            found=model.example_shapes,
            expected=f"one to four batches of at most {MAX_EXAMPLE_VALUES} values",
            remedy="pass smaller example_inputs to prepare_harmoq; the images of calibration may be large",
        )
    tensors, layout = flatten_floats(stored_tensors(model), storable_state(model.model))
    weights = to_safetensors(tensors)
    digest = hashlib.sha256(weights).hexdigest()
    entry = {"file": f"model-{digest[:12]}.safetensors", "sha256": digest, "layout": layout}
    described = {**_config_of(model), "weights": entry}
    _check_that_it_loads(model, described, tensors)
    config = canonical_json(seal(described))
    try:
        check_model_folder(folder)
        make_folder(folder)
        _write_model(folder, entry["file"], weights, config)
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that no system takes
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(
            f"Cannot save to {folder}", found=found, remedy="free space or choose another folder"
        ) from error
    _remove_leftovers(folder, entry["file"])
    return folder


def _write_model(folder: Path, name: str, weights: bytes, config: bytes) -> None:
    """Write the weights, then the config that makes them the folder's model; on any error the folder is as it was."""
    fresh = not (folder / name).exists()
    try:
        for target, data in ((name, weights), (CONFIG_NAME, config)):
            with atomic_write(folder / target) as file:
                file.write(data)
    except BaseException:
        if fresh and not _is_current(folder, name):
            (folder / name).unlink(missing_ok=True)
        raise


def _is_current(folder: Path, name: str) -> bool:
    """Whether the config of the folder names these weights: an interrupt may come just after the rename."""
    try:
        return name.encode() in (folder / CONFIG_NAME).read_bytes()
    except OSError:
        return False


def _remove_leftovers(folder: Path, current: str) -> None:
    """Remove the weights that were replaced, and what killed processes left. The new model is complete already."""
    try:
        for file in folder.iterdir():
            if LEFTOVER_NAME.fullmatch(file.name) and file.name != current:
                file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not tidy up %s: %s", folder, error)


def folder_bytes(path: str | Path) -> int:
    """Bytes of all files of a saved model."""
    return sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())


def float_bytes(model: nn.Module) -> int:
    """Bytes of a float model's parameters in float32; buffers do not count."""
    return sum(p.numel() * 4 for p in model.parameters())


def _check_that_it_loads(model: QuantizedModel, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Assemble the model from what is about to be written, and compare its output with the model's, bit for bit.

    An architecture that spandrel does not build cannot be assembled here; examples that are large are not run.
    """
    if model.traits.architecture is None:
        return
    again = assembled(json.loads(canonical_json(config)), dict(tensors))
    own = model.sites()
    for name, site in again.sites().items():
        site.backend = own[name].backend
    shape = min(model.example_shapes, key=math.prod)
    if math.prod(shape) > _MOST_CHECKED:
        return
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(place)
    outputs = []
    for which in (model, again.to(place)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs.append(which(image))
    if not same_values(*outputs):
        raise SavedModelError(
            "The model would not compute the same once it is loaded",
            found="another output, bit for bit, of the model assembled from what was to be saved",
            remedy="save the model that convert_harmoq returns, of an architecture as spandrel constructs it",
        )


# --- what is stored ---------------------------------------------------------------------------------------------------


def stored_tensors(model: QuantizedModel) -> dict[str, Tensor]:
    """The tensors of a saved model by name: those of the sites, and the float state the constructor does not make."""
    state = storable_state(model.model)
    skip = _recomputed(model, state)
    return {name: tensor.detach().cpu() for name, tensor in state.items() if name not in skip}


def stored_bytes(model: QuantizedModel) -> dict[str, int]:
    """Bytes that each tensor of a saved model takes in the file, by name."""

    def dtype(tensor: Tensor) -> torch.dtype:
        return FLOAT_TYPES.get(smallest_type(tensor), tensor.dtype) if tensor.is_floating_point() else tensor.dtype

    return {name: tensor.numel() * dtype(tensor).itemsize for name, tensor in stored_tensors(model).items()}


def _recomputed(model: QuantizedModel, state: dict[str, Tensor]) -> set[str]:
    """Names of buffers that a freshly constructed model has bit for bit."""
    if model.traits.architecture is None:
        return set()
    fresh = dict(build_architecture(model.traits.architecture, random=False).named_buffers())
    quantized = {f"{name}." for name, m in model.model.named_modules() if isinstance(m, QuantizedSite)}
    skip = set()
    for name, tensor in state.items():
        if isinstance(tensor, nn.Parameter) or f"{name.rpartition('.')[0]}." in quantized:
            continue
        twin = fresh.get(name)
        if twin is not None and twin.shape == tensor.shape and torch.equal(twin, tensor.detach().to("cpu", twin.dtype)):
            skip.add(name)
    return skip


def _config_of(model: QuantizedModel) -> dict[str, Any]:
    history = {} if model.history is None else {"history": model.history.to_dict()}
    return {
        **history,
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "library_version": __version__,
        "quantization_config": model.config.to_dict(),
        "float_dtype": str(model.float_dtype).removeprefix("torch."),
        "traits": model.traits.to_dict(),
        "example_shapes": [list(shape) for shape in model.example_shapes],
        "found": description_of(model).to_dict(),
    }


def check_model_folder(folder: Path) -> None:
    """Whether a model can be saved to a folder; to be called before the work begins.

    Raises:
        OutputError: A file is in its place, it may not be written to, or it holds something else than a saved model.
    """
    check_output_folder(folder)
    if folder.is_dir() and not _may_replace(folder):
        raise OutputError(
            f"{folder} holds something else than a saved model",
            expected="an empty folder or a saved model",
            remedy="choose another folder",
        )


def _may_replace(folder: Path) -> bool:
    """Whether a folder is empty, holds a saved model, or only what an interrupted save left."""
    config = folder / CONFIG_NAME
    if config.is_file():  # other programs write files of this name, too
        return config.stat().st_size <= MAX_CONFIG_BYTES and f'"format":"{FORMAT}"'.encode() in config.read_bytes()
    return all(LEFTOVER_NAME.fullmatch(file.name) for file in folder.iterdir())
