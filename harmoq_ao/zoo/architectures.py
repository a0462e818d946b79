"""Architectures as data: a JSON description of a spandrel model, and the model constructed from it again.

A description is part of a saved model's config file, which may come from anywhere. It can only name a model class of
spandrel, and only pass it numbers, strings and containers of them.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from harmoq_ao.common.errors import SavedModelError, shown
from harmoq_ao.zoo.construction_budget import ConstructionBudget
from harmoq_ao.zoo.spandrel_import import import_architecture
from harmoq_ao.zoo.transformers_models import (
    CLASSES,
    hyperparameters_of,
    transformers_class,
    transformers_version,
)

MAX_INTEGER = 4096
"""Largest integer accepted as a hyperparameter (images' sides, channels, depths)."""
MAX_SEQUENCE = 64
"""Longest list or tuple accepted as a hyperparameter."""
_CLASS_PATTERN = re.compile(r"(spandrel\.architectures(?:\.[A-Za-z_]\w*)+):([A-Za-z_]\w*)")


def architecture_spec(model: nn.Module) -> dict[str, Any]:
    """Describe a spandrel model so that `build_architecture` can construct it again, with other weights.

    Returns:
        A dict ready for JSON: `architecture` (spandrel's id), `class` (`module:name`), `hyperparameters` (constructor
        arguments, a tuple written as `{"tuple": [...]}`), `spandrel` (the version that made it).

    Raises:
        SavedModelError: The model is not of spandrel, or was constructed with something JSON cannot hold.
    """
    cls = type(model)
    if cls.__module__.startswith("transformers.") and cls.__name__ in CLASSES:
        return {
            "architecture": cls.__name__,
            "class": f"transformers:{cls.__name__}",
            "hyperparameters": {name: _encode(value, name) for name, value in hyperparameters_of(model).items()},
            "transformers": transformers_version(),
        }
    reference = f"{cls.__module__}:{cls.__qualname__}"
    if not _CLASS_PATTERN.fullmatch(reference) or not _keeps_hyperparameters(cls):
        raise SavedModelError(
            "This model cannot be described by its architecture",
            found=reference,
            expected="a model of spandrel.architectures",
            remedy="load the checkpoint with spandrel (harmoq_ao.load_model)",
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
        "spandrel": spandrel_version(),
    }


def build_architecture(spec: object, *, random: bool = True) -> nn.Module:
    """Construct the model that `architecture_spec` described, with fresh random weights, in evaluation mode.

    `spec` is untrusted: only model classes below `spandrel.architectures` can be named, only numbers, strings and
    containers of them can be passed, no integer above `MAX_INTEGER`, no sequence longer than `MAX_SEQUENCE`, and the
    constructor is stopped when it allocates more than `MAX_CONSTRUCTION_BYTES` or issues more than
    `MAX_CONSTRUCTION_OPS` operations. The global random state is left as it was.

    Args:
        spec: The description.
        random: False for weights that are about to be replaced: they come as zeros, at a tenth of the time.

    Raises:
        SavedModelError: The description is malformed, names something else, or the constructor refuses it.
    """
    if not isinstance(spec, Mapping):
        raise _malformed("is no table", found=type(spec).__name__, expected="a JSON object")
    encoded = spec.get("hyperparameters")
    if not isinstance(encoded, Mapping):
        raise _malformed("has no hyperparameters", found=shown(encoded), expected="a JSON object")
    arguments = {name: _decode(value, str(name)) for name, value in encoded.items()}
    cls, construct = _constructor(spec.get("class"), arguments)
    try:
        with torch.random.fork_rng(devices=[]), ConstructionBudget(random):
            model = construct()
    except Exception as error:  # the author's constructor, on arguments that only look right
        raise SavedModelError(
            f"The architecture {cls.__name__} cannot be constructed from its description",
            found=first_lines(error),
            expected=f"what spandrel {spec.get('spandrel', '')} wrote (installed: {spandrel_version()})",
            remedy="save the model again, or install the version of spandrel that saved it",
        ) from error
    return model.eval()


def _constructor(reference: object, arguments: dict[str, Any]) -> tuple[type[nn.Module], Callable[[], nn.Module]]:
    """The class that a description names, and what constructs it with arguments that are checked."""
    if reference not in [f"transformers:{name}" for name in CLASSES]:
        cls = _architecture_class(reference)
        _check_arguments(cls, arguments)
        return cls, lambda: cls(**arguments)
    try:
        model, config, names = transformers_class(str(reference).partition(":")[2])
    except (ImportError, AttributeError) as error:
        raise SavedModelError(
            "The model is of the package transformers, which is not there or of another version",
            found=first_lines(error),
            expected=f"a version of transformers with {reference}",
            remedy="pip install transformers",
        ) from error
    _check_arguments(config, arguments)
    if not set(arguments) <= set(names):
        raise _malformed("has settings of no architecture", found=sorted(set(arguments) - set(names)), expected=names)
    return model, lambda: model(config(**arguments))


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
        cls = getattr(import_architecture(match.group(1)), match.group(2))
    except (ImportError, AttributeError) as error:
        raise _malformed(
            f"names a class that spandrel {spandrel_version()} does not have",
            found=reference,
            expected="an existing class",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and _keeps_hyperparameters(cls)):
        raise _malformed("names something that is not a complete model", found=reference, expected="a model class")
    return cls


def _keeps_hyperparameters(cls: type) -> bool:
    """Whether `cls` itself carries spandrel's `@store_hyperparameters`."""
    return "hyperparameters" in vars(cls) and hasattr(vars(cls).get("__init__"), "__wrapped__")


def _check_arguments(cls: type[Any], arguments: Mapping[str, Any]) -> None:
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


def first_lines(error: Exception) -> str:
    """Type and beginning of the message of a foreign error."""
    text = " ".join(line.strip() for line in str(error).splitlines()[:3])
    return f"{type(error).__name__}: {text[:300]}"


def spandrel_version() -> str:
    """Version of the installed spandrel."""
    return importlib.metadata.version("spandrel")
