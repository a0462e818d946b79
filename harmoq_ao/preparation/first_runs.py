"""Runs of the float model on the example images, before anything is changed.

Each example runs once; everything preparation needs from a run is recorded on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmoq_ao.common.calling import call_with_image, image_parameter
from harmoq_ao.common.errors import HarmoqError, InputError
from harmoq_ao.graph import Discovery, discovering, without_fast_path
from harmoq_ao.graph.exchange import original_class
from harmoq_ao.images import check_image_tensor

logger = logging.getLogger(__name__)

_EXAMPLE_SIZE = (64, 64)
_SECOND_SIZE = (48, 72)
_REFUSALS = (RuntimeError, ValueError, AssertionError, IndexError)  # raised by a network that does not accept a size
_Prints = dict[str, list[tuple[Any, ...]]]


class Run(NamedTuple):
    """An image batch and the float model's output."""

    example: Tensor
    output: Any


class FirstRuns(NamedTuple):
    """Outcome of the runs.

    Args:
        runs: The examples that the model accepts, with its outputs.
        found: Which modules contract what.
        fixed: Linear modules whose input does not depend on the image.
    """

    runs: list[Run]
    found: Discovery
    fixed: set[str]


def first_runs(model: nn.Module, given: Tensor | Sequence[Tensor] | None) -> FirstRuns:
    """Run the float model on the examples.

    Args:
        model: In evaluation mode.
        given: What the user gave: one image batch `[B, C, H, W]` or several; None for random images of two sizes, the
            second only if the model accepts it.

    Raises:
        InputError: The examples are not images, or the model does not accept them.
    """
    runs: list[Run] = []
    found, prints = Discovery(), _Prints()
    for example in _examples(model, given):
        try:
            with discovering(model) as shown, _input_prints(model) as seen:
                output = run(model, example)
        except InputError as error:
            if not runs or given is not None or not isinstance(error.__cause__, _REFUSALS):
                raise
            logger.debug("the model does not take %s: %s", tuple(example.shape), error.__cause__)
            continue
        if not runs:
            prints = seen
        runs.append(Run(example, output))
        found.add(shown)
    return FirstRuns(runs, found, _image_independent(model, runs[0].example, prints))


def _examples(model: nn.Module, given: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [_checked_example(given)]
    if given is not None:
        if not isinstance(given, (list, tuple)) or not given:
            raise InputError(
                "example_inputs holds no image",
                found="nothing" if isinstance(given, (list, tuple)) else type(given).__name__,
                expected="one image batch [B, C, H, W], or a list of some",
            )
        return [_checked_example(e) for e in given]
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else _input_channels(model, first)
    parameter = next(model.parameters(), torch.empty(0))
    return [_random_image(channels, size, parameter, seed) for seed, size in enumerate((_EXAMPLE_SIZE, _SECOND_SIZE))]


def _input_channels(model: nn.Module, first: nn.Conv2d) -> int:
    declared = getattr(model, "hyperparameters", {}).get("in_chans")
    return declared if isinstance(declared, int) else first.in_channels


def _random_image(channels: int, size: tuple[int, int], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, channels, *size, generator=generator).to(like.device, like.dtype)


def _checked_example(example: Tensor) -> Tensor:
    check_image_tensor(example)
    return example


def run(model: nn.Module, image: Tensor) -> Any:
    """The model's output for `[B, C, H, W]`, from a fixed random state, with torch's attention taken apart.

    Raises:
        InputError: The model does not accept it.
    """
    keyword = image_parameter(original_class(model)).keyword
    try:
        with torch.random.fork_rng(devices=[]), without_fast_path():
            torch.manual_seed(0)
            return call_with_image(model, keyword, image)
    except HarmoqError:
        raise
    except Exception as error:
        raise InputError(
            "The float model does not run on the example",
            found=f"{tuple(image.shape)} -> {type(error).__name__}: {error}",
            remedy="pass example_inputs that the model accepts",
        ) from error


# --- what does not depend on the image --------------------------------------------------------------------------------


def _image_independent(model: nn.Module, example: Tensor, first: _Prints) -> set[str]:
    """Linear modules whose input is the same for two different images of one size (position-bias networks).

    Args:
        model: The float model.
        example: One of the images.
        first: Prints of what it brought to each linear module.
    """
    generator = torch.Generator().manual_seed(1)
    other = example + 0.25 + 0.5 * torch.rand(example.shape, generator=generator).to(example)  # differs everywhere
    with _input_prints(model) as second:
        run(model, other)
    return {name for name, seen in first.items() if second.get(name) == seen}


@contextmanager
def _input_prints(model: nn.Module) -> Iterator[_Prints]:
    """Context manager that records shape, sum and norm of every input of a linear module under the module's name."""
    prints: _Prints = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (*inputs, *kwargs.values())[0].detach()
            values = x.sum(dtype=torch.float64), torch.linalg.vector_norm(x, dtype=torch.float64)
            prints.setdefault(name, []).append((tuple(x.shape), *(v.item() for v in values)))

        return record

    linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in linears]
    try:
        yield prints
    finally:
        for handle in handles:
            handle.remove()
