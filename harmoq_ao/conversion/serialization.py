"""Saved models: a folder with ``config.json`` and one safetensors file. Never a pickle, never code.

``config.json`` names the architecture, the configuration and the weights file, carries the SHA-256 of both and, where
it is known, how the model was made (:class:`History`, which older readers skip); a file
with a changed or missing byte is refused. It is written last, by a rename, so that an interrupted save leaves the model
that was there before. What the constructor of the architecture recomputes (masks, index tables) is not stored.

Layout of the weights file: packed codes and integer buffers stand under their own names. All float tensors, of which a
transformer has many small ones, are flattened and concatenated in the order of their sorted names into one tensor per
type, ``floats.float16``, ``floats.bfloat16`` and ``floats.float32``; each goes to the smallest type that holds it
exactly. ``layout`` in the config has one letter for each name of the model's state, sorted: ``h``, ``b`` or ``f`` for
those types, ``-`` for what is not there. (Named one by one, their header entries would cost more than a 2-bit weight.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from harmoq_ao.common.errors import ConfigError, OutputError, SavedModelError, shown
from harmoq_ao.common.output import atomic_write, make_folder
from harmoq_ao.common.version import __version__
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.convert import QuantizedModel, finalize, replace_sites
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import ModelTraits, PreparedModel, wants_joint_scale, wants_joint_shift
from harmoq_ao.sites.prepared import PreparedSite
from harmoq_ao.sites.quantized import QuantizedSite, empty_site
from harmoq_ao.zoo import build_architecture

logger = logging.getLogger(__name__)

FORMAT = "harmoq-ao"
SCHEMA_VERSION = 3
_CONFIG = "config.json"
_WEIGHTS = re.compile(r"model-[0-9a-f]{12}\.safetensors")
_LEFTOVER = re.compile(r"model-[0-9a-f]{12}\.safetensors|\.(model-|config\.json).*\.tmp")
_MAX_CONFIG_BYTES = 16 << 20
_MAX_EXAMPLE_VALUES = 1 << 22  # of one example batch: a load runs the model on it
_MAX_DB = 1e4
_REMEDY = "copy the folder again, or quantize the float model anew"


def save_quantized(model: QuantizedModel, path: str | Path) -> Path:
    """Save a quantized model to a folder.

    Args:
        model: From :func:`convert_harmoq`.
        path: Folder; created, or replaced if it holds a saved model.

    Returns:
        The folder.

    Raises:
        OutputError: The folder cannot be written, or holds something else. A model saved there before is untouched.
        SavedModelError: Not a converted model, or one prepared on examples too large to be run at every load.
    """
    if not isinstance(model, QuantizedModel):
        raise SavedModelError(
            "save_quantized takes a converted model", found=type(model).__name__, remedy="call convert_harmoq first"
        )
    folder = Path(path)
    if not _are_shapes([list(shape) for shape in model.example_shapes]):
        raise SavedModelError(
            "The model was prepared on examples that are too large to be run again at every load",
            found=model.example_shapes,
            expected=f"one to four batches of at most {_MAX_EXAMPLE_VALUES} values",
            remedy="pass smaller example_inputs to prepare_harmoq; the images of calibration may be large",
        )
    tensors, layout = _flattened(stored_tensors(model), _state(model))
    weights = to_safetensors(tensors)
    digest = hashlib.sha256(weights).hexdigest()
    entry = {"file": f"model-{digest[:12]}.safetensors", "sha256": digest, "layout": layout}
    config = _dump(_seal({**_config_of(model), "weights": entry}))
    try:
        _check_target(folder)
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
    """Weights, then the config that makes them the model of the folder; on any error the folder is as it was."""
    fresh = not (folder / name).exists()
    try:
        for target, data in ((name, weights), (_CONFIG, config)):
            with atomic_write(folder / target) as file:
                file.write(data)
    except BaseException:
        if fresh and not _is_current(folder, name):
            (folder / name).unlink(missing_ok=True)
        raise


def _is_current(folder: Path, name: str) -> bool:
    """Whether the config of the folder names these weights: an interrupt may come just after the rename."""
    try:
        return name.encode() in (folder / _CONFIG).read_bytes()
    except OSError:
        return False


def _remove_leftovers(folder: Path, current: str) -> None:
    """Remove the weights that were replaced, and what killed processes left. The new model is complete already."""
    try:
        for file in folder.iterdir():
            if _LEFTOVER.fullmatch(file.name) and file.name != current:
                file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not tidy up %s: %s", folder, error)


def load_quantized(path: str | Path, model: nn.Module | None = None) -> QuantizedModel:
    """Load a saved model.

    Args:
        path: Folder written by :func:`save_quantized`.
        model: A float model of the same architecture, with any weights; needed where the architecture is not one that
            spandrel builds.

    Raises:
        SavedModelError: Missing, truncated or changed files, another format, or tensors that do not fit.
    """
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_tensors(folder, config["weights"])
    try:
        return _assembled(config, tensors, model)
    except SavedModelError:
        raise
    except ConfigError as error:
        raise SavedModelError(f"{folder / _CONFIG} holds a configuration that is not valid: {error}") from error
    except Exception as error:  # an author's model on hyperparameters, shapes and tensors that only look right
        raise SavedModelError(
            f"The model in {folder} does not fit its architecture",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy=_REMEDY if model is None else "pass a float model of the architecture that was saved",
        ) from error


def _assembled(config: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module | None) -> QuantizedModel:
    """The model that a checked config and its tensors describe."""
    settings = HarmoqConfig.from_dict(config["quantization_config"])
    traits = ModelTraits.from_dict(config["traits"])
    skeleton = _skeleton(traits) if model is None else model if isinstance(model, nn.Module) else _inner(model)
    prepared = prepare_harmoq(skeleton, settings, _examples(config, skeleton))
    prepared.traits = traits
    _apply_measurements(prepared, config["sqnr_db"])
    quantized = _empty_model(prepared)
    quantized.history = History.from_dict(config["history"]) if "history" in config else None
    _fill(quantized, _unflattened(tensors, config["weights"]["layout"], _state(quantized)))
    if config["float_dtype"] == "bfloat16":
        return quantized.set_float_dtype(torch.bfloat16)
    finalize(quantized)
    return quantized


def folder_bytes(path: str | Path) -> int:
    """Bytes of all files of a saved model."""
    return sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())


def float_bytes(model: nn.Module) -> int:
    """Bytes of a float model's parameters in float32; buffers do not count."""
    return sum(p.numel() * 4 for p in model.parameters())


# --- what is stored ---------------------------------------------------------------------------------------------------


_FLOATS = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32}


def _state(model: QuantizedModel) -> dict[str, Tensor]:
    """Everything that could be stored, by sorted name: shared tensors once, released weights not at all."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(model.model.state_dict(keep_vars=True).items()):
        if tensor.device.type != "meta" and id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def stored_tensors(model: QuantizedModel) -> dict[str, Tensor]:
    """The tensors of a saved model by name: those of the sites, and the float state the constructor does not make."""
    state = _state(model)
    skip = _recomputed(model, state)
    return {name: tensor.detach().cpu() for name, tensor in state.items() if name not in skip}


def stored_bytes(model: QuantizedModel) -> dict[str, int]:
    """Bytes that each tensor of a saved model takes in the file, by name."""

    def dtype(tensor: Tensor) -> torch.dtype:
        return _FLOATS.get(_letter(tensor), tensor.dtype) if tensor.is_floating_point() else tensor.dtype

    return {name: tensor.numel() * dtype(tensor).itemsize for name, tensor in stored_tensors(model).items()}


def _flattened(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The file's tensors and the layout of its float ones."""
    letters = {name: _letter(t) if t.is_floating_point() else "-" for name, t in tensors.items()}
    named = {name: t.contiguous() for name, t in tensors.items() if letters[name] == "-"}
    parts: dict[str, list[Tensor]] = {letter: [] for letter in _FLOATS}
    layout = ""
    for name in state:
        letter = letters.get(name, "-")
        layout += letter
        if letter != "-":
            parts[letter].append(tensors[name].to(_FLOATS[letter]).flatten())
    blobs = {_blob(letter): torch.cat(chunks) for letter, chunks in parts.items() if chunks}
    return named | blobs, layout


def _unflattened(file: dict[str, Tensor], layout: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`_flattened`, given the state of an empty model."""
    blobs = {letter: file.pop(_blob(letter), torch.empty(0, dtype=dtype)) for letter, dtype in _FLOATS.items()}
    needed = dict.fromkeys(_FLOATS, 0)
    for tensor, letter in zip(state.values(), layout, strict=False):
        if letter in needed:
            needed[letter] += tensor.numel()
    fits = all(b.dtype == _FLOATS[k] and b.dim() == 1 and b.numel() == needed[k] for k, b in blobs.items())
    if len(layout) != len(state) or not set(layout) <= {*_FLOATS, "-"} or not fits:
        raise SavedModelError(
            "The stored tensors are not those of the architecture",
            found=f"{len(layout)} entries, {sum(b.numel() for b in blobs.values())} numbers",
            expected=f"{len(state)} entries, {sum(needed.values())} numbers",
            remedy="use the versions of spandrel and harmoq-ao that saved it",
        )
    tensors = dict(file)
    at = dict.fromkeys(_FLOATS, 0)
    for (name, target), letter in zip(state.items(), layout, strict=True):
        if letter != "-":
            tensors[name] = blobs[letter][at[letter] : at[letter] + target.numel()].reshape(target.shape)
            at[letter] += target.numel()
    return tensors


def _blob(letter: str) -> str:
    return f"floats.{str(_FLOATS[letter]).removeprefix('torch.')}"


def _letter(tensor: Tensor) -> str:
    """The smallest float type that holds the values exactly, or ``-`` where none does (float64)."""
    for letter, dtype in _FLOATS.items():
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return letter
    return "-" if tensor.dtype == torch.float64 else "f"


def _recomputed(model: QuantizedModel, state: dict[str, Tensor]) -> set[str]:
    """Names of buffers that a freshly constructed model has bit for bit."""
    if model.traits.architecture is None:
        return set()
    fresh = dict(build_architecture(model.traits.architecture).named_buffers())
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
        "sqnr_db": {r.name: None if r.sqnr_db is None else round(r.sqnr_db, 2) for r in model.rows if r.quantized},
    }


def _seal(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "sha256": hashlib.sha256(_dump(config)).hexdigest()}


def _dump(config: dict[str, Any]) -> bytes:
    return json.dumps(config, separators=(",", ":"), sort_keys=True).encode()


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"Cannot save to {folder}", found="a file", expected="a folder", remedy="choose another path")
    if folder.is_dir() and not _may_replace(folder):
        raise OutputError(
            f"{folder} holds something else than a saved model",
            expected="an empty folder or a saved model",
            remedy="choose another folder",
        )


def _may_replace(folder: Path) -> bool:
    """Whether a folder is empty, holds a saved model, or only what an interrupted save left."""
    config = folder / _CONFIG
    if config.is_file():  # other programs write files of this name, too
        return f'"format":"{FORMAT}"'.encode() in config.read_bytes()
    return all(_LEFTOVER.fullmatch(file.name) for file in folder.iterdir())


# --- reading what may come from anywhere ------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        if not path.is_file():
            found = "a folder without config.json" if folder.is_dir() else "no such folder"
            raise SavedModelError(
                f"{folder} is no saved model", found=found, expected="a folder written by save_quantized"
            )
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise SavedModelError(f"{path} is too large", found=f"{path.stat().st_size} bytes", remedy=_REMEDY)
        config = json.loads(path.read_bytes())
        body = _dump({k: v for k, v in config.items() if k != "sha256"}) if isinstance(config, dict) else b""
    except SavedModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise SavedModelError(f"{path} cannot be read", found=str(error)[:200], remedy=_REMEDY) from error
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
        raise SavedModelError(f"{path} was changed after it was saved", found="another SHA-256", remedy=_REMEDY)
    _check_fields(path, config)
    return config


_WEIGHTS_FIELDS = ("file", "sha256", "layout")


def _is_db(value: Any) -> bool:
    return type(value) in (int, float) and -_MAX_DB <= value <= _MAX_DB


def _check_fields(path: Path, config: dict[str, Any]) -> None:
    kinds: dict[str, Callable[[Any], bool]] = {
        "quantization_config": lambda v: isinstance(v, dict),
        "float_dtype": lambda v: v in ("float32", "bfloat16"),
        "traits": lambda v: isinstance(v, dict),
        "example_shapes": _are_shapes,
        "sqnr_db": lambda v: isinstance(v, dict) and all(x is None or _is_db(x) for x in v.values()),
        "weights": lambda v: isinstance(v, dict) and all(isinstance(v.get(k), str) for k in _WEIGHTS_FIELDS),
    }
    for name, valid in kinds.items():
        if name not in config or not valid(config[name]):
            raise SavedModelError(f"{path} has no valid {name!r}", found=shown(config.get(name)), remedy=_REMEDY)


def _are_shapes(value: Any) -> bool:
    def fits(shape: Any) -> bool:
        whole = isinstance(shape, list) and len(shape) == 4 and all(type(n) is int for n in shape)
        return whole and min(shape) > 0 and math.prod(shape) <= _MAX_EXAMPLE_VALUES

    return isinstance(value, list) and 1 <= len(value) <= 4 and all(fits(shape) for shape in value)


def _read_tensors(folder: Path, weights: dict[str, str]) -> dict[str, Tensor]:
    name = weights["file"]
    path = folder / name
    if not _WEIGHTS.fullmatch(name):
        raise SavedModelError(
            f"{folder} names its weights oddly", found=shown(name), expected="model-<12 digits>.safetensors"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SavedModelError(
            f"{folder} lacks its weights", found=error.strerror, expected=name, remedy=_REMEDY
        ) from error
    if hashlib.sha256(data).hexdigest() != weights["sha256"]:
        raise SavedModelError(f"{path} is damaged", found=f"{len(data)} bytes of another SHA-256", remedy=_REMEDY)
    try:
        return from_safetensors(data)
    except Exception as error:  # also types that this torch has not
        raise SavedModelError(f"{path} is no safetensors file", found=str(error)[:200], remedy=_REMEDY) from error


def _skeleton(traits: ModelTraits) -> nn.Module:
    spec = traits.architecture
    if spec is None:
        raise SavedModelError(
            "This model is of an architecture that spandrel does not build",
            remedy="pass a float model of the same architecture: load_quantized(path, model=...)",
        )
    return build_architecture(spec)


def _inner(model: Any) -> nn.Module:
    """The module of a loaded checkpoint."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise SavedModelError("model must be a float model", found=type(model).__name__, expected="torch.nn.Module")
    return inner


def _examples(config: dict[str, Any], skeleton: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    like = next(skeleton.parameters(), torch.empty(0))
    return [torch.rand(shape, generator=generator).to(like) for shape in config["example_shapes"]]


# --- from tensors to a model ------------------------------------------------------------------------------------------


def _apply_measurements(prepared: PreparedModel, measured: dict[str, float | None]) -> None:
    names = {m.site.name for m in prepared.sites() if m.quantizers()}
    if names != set(measured):
        odd = sorted(names ^ set(measured))
        raise SavedModelError(
            "The saved sites are not those of the architecture",
            found=f"{len(odd)} differ, such as {odd[0]}",
            remedy="use the versions of spandrel and harmoq-ao that saved it",
        )
    for module in prepared.sites():
        module.site.sqnr_db = measured.get(module.site.name)


def _empty_model(prepared: PreparedModel) -> QuantizedModel:
    rows = prepared.report().rows

    def make(module: PreparedSite) -> QuantizedSite:
        settings = prepared.settings(module.site)
        joint = wants_joint_scale(module.site, settings), wants_joint_shift(module.site, settings)
        return empty_site(module, settings, *joint)

    replace_sites(prepared.model, make)
    quantized = QuantizedModel(prepared.model, prepared.config, rows, prepared.example_shapes, prepared.traits)
    return quantized.eval()


def _fill(quantized: QuantizedModel, tensors: dict[str, Tensor]) -> None:
    """Copy stored tensors into the model, checking names, shapes, types and values."""
    expected = _state(quantized)
    unknown = sorted(set(tensors) - set(expected))
    needed = {n for n, t in expected.items() if isinstance(t, nn.Parameter) or _of_site(quantized, n)}
    missing = sorted(needed - set(tensors))
    if unknown or missing:
        found = f"unknown {unknown[0]}" if unknown else f"missing {missing[0]}"
        raise SavedModelError("The stored tensors do not fit the architecture", found=found, remedy=_REMEDY)
    for name, tensor in tensors.items():
        target = expected[name]
        _check_tensor(name, tensor, target, _of_site(quantized, name))
        with torch.no_grad():
            target.copy_(tensor)


def _of_site(quantized: QuantizedModel, name: str) -> bool:
    return isinstance(quantized.model.get_submodule(name.rpartition(".")[0]), QuantizedSite)


def _check_tensor(name: str, tensor: Tensor, target: Tensor, of_site: bool) -> None:
    if tensor.shape != target.shape:
        raise SavedModelError(
            f"{name} has the wrong shape", found=tuple(tensor.shape), expected=tuple(target.shape), remedy=_REMEDY
        )
    if tensor.is_floating_point() != target.is_floating_point() or (
        not tensor.is_floating_point() and tensor.dtype != target.dtype
    ):
        raise SavedModelError(f"{name} has the wrong type", found=tensor.dtype, expected=target.dtype, remedy=_REMEDY)
    if isinstance(target, nn.Parameter) or of_site:
        _check_values(name, tensor)


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    if not bool(torch.isfinite(tensor).all()):
        raise SavedModelError(f"{name} is not finite", found="NaN or infinity", remedy=_REMEDY)
    kind = name.rpartition(".")[2]
    positive = tensor if kind in ("weight_scale", "joint_scale") else tensor[:1] if kind.endswith("_bounds") else None
    if positive is not None and not bool((positive > 0).all()):
        raise SavedModelError(f"{name} must be positive", found=float(positive.min()), remedy=_REMEDY)


__all__ = [
    "float_bytes",
    "folder_bytes",
    "load_quantized",
    "save_quantized",
    "stored_bytes",
    "stored_tensors",
]
