"""Tensors within what a model returns: a tensor, tuples, dictionaries, or objects with tensors in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from harmoq_ao.common.errors import InputError

_DEEPEST = 6  # levels of containers
_PLAIN = (str, bytes, int, float, complex, bool, type(None), nn.Module, type)


def entries_of(value: Any) -> dict[str, Any] | None:
    """What a container or an object holds, by key, index or attribute; None of a tensor and of plain values."""
    if isinstance(value, (Tensor, *_PLAIN)) or callable(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return {str(index): entry for index, entry in enumerate(value)}
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def tensors_in(value: Any) -> dict[str, Tensor]:
    """Tensors by their path: keys, indices and attributes joined by dots; the path of the value itself is empty."""
    return dict(_tensors(value, "", 0))


def _tensors(value: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    entries = entries_of(value) if depth < _DEEPEST else None
    for name, entry in (entries or {}).items():
        yield from _tensors(entry, f"{path}.{name}" if path else name, depth + 1)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with its tensors changed; what holds none is the same object."""
    if isinstance(value, Tensor):
        return change(value)
    if not tensors_in(value):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(entry, change) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(entry, change) for entry in value)
    changed = copy.copy(value)
    if isinstance(value, Mapping):
        for key, entry in value.items():
            changed[key] = map_tensors(entry, change)
    else:
        for name, entry in vars(value).items():
            object.__setattr__(changed, name, map_tensors(entry, change))
    return changed


def image_path(output: Any, example: Tensor, named: str | int | None = None) -> str | None:
    """Which tensor of an output is the image: the largest one of the input's sides, times a whole number.

    Of several the one that is not within a list of others, such as the images of earlier stages.

    Args:
        output: What the model returned for `example`.
        example: An image batch `[B, C, H, W]`.
        named: The path, where the user gives it.

    Returns:
        The path of a tensor within the output; None where the output is the image.

    Raises:
        InputError: No tensor is an image of the input, several may be, or there is none of that name.
    """
    tensors = tensors_in(output)
    if named is not None:
        if str(named) not in tensors:
            raise InputError("The output of the model holds no such tensor", found=named, expected=_listed(tensors))
        return str(named) or None
    if isinstance(output, Tensor):
        return None
    fitting = {path: tensor for path, tensor in tensors.items() if _factor(tensor, example)}
    largest = max((_factor(tensor, example) for tensor in fitting.values()), default=0)
    largest_ones = {path: tensor for path, tensor in fitting.items() if _factor(tensor, example) == largest}
    depth = min((path.count(".") for path in largest_ones), default=0)
    candidates = {path: tensor for path, tensor in largest_ones.items() if path.count(".") == depth}
    distinct = {id(tensor): path for path, tensor in reversed(candidates.items())}
    if len(distinct) != 1:
        raise InputError(
            f"The model returns a {type(output).__name__}, in which "
            + ("no" if not distinct else "more than one")
            + " tensor can be the image",
            found=_listed(candidates or tensors),
            expected=f"one tensor [{example.shape[0]}, 1 to 4, {example.shape[-2]} n, {example.shape[-1]} n]",
            remedy="name it: prepare_harmoq(model, output=...), a key, an attribute or an index",
        )
    return next(iter(distinct.values()))


def _factor(tensor: Tensor, example: Tensor) -> int:
    """By which whole number a tensor is larger than the input; 0 where it is no image of it."""
    if tensor.dim() != 4 or tensor.shape[0] != example.shape[0] or not 1 <= tensor.shape[1] <= 4:
        return 0
    factors = [divmod(out, given) for out, given in zip(tensor.shape[-2:], example.shape[-2:], strict=True)]
    whole = all(rest == 0 for _, rest in factors) and factors[0] == factors[1]
    return factors[0][0] if whole and tensor.is_floating_point() else 0


def _listed(tensors: dict[str, Tensor]) -> str:
    return "; ".join(f"{path or 'the output'} {list(t.shape)}" for path, t in tensors.items())[:400] or "no tensor"


def image_of(output: Any, path: str | None) -> Tensor:
    """The tensor of an output at a path from :func:`image_path`; the output itself, if it is a tensor.

    Raises:
        InputError: The output has none there.
    """
    value = output
    for name in [] if path is None or isinstance(output, Tensor) else path.split("."):
        value = (entries_of(value) or {}).get(name)
    if not isinstance(value, Tensor):
        raise InputError(
            "The model returned no image",
            found=f"a {type(output).__name__} of {_listed(tensors_in(output))}",
            expected="a tensor" if path is None else f"a tensor at {path!r}",
        )
    return value
