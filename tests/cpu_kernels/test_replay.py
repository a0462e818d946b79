"""Calls that are made again against the function that made them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from harmoq_ao.cpu_kernels import library
from harmoq_ao.cpu_kernels.column_means import column_means
from harmoq_ao.cpu_kernels.instruction_sets import NAMES
from harmoq_ao.cpu_kernels.replay import NotReplayableError, record

pytestmark = pytest.mark.skipif(not library.status().available, reason="the C++ kernels cannot be built here")


def image(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lists(x: Tensor) -> Tensor:
    first, second = x.split([3, 5], 1)
    return torch.cat([first, x.new_ones(6, 2), second.flip([0, 1])], 1)


def indices(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, torch.tensor([1, 3])] = 5.0
    return y[torch.tensor([0, 2])][..., None].permute(2, 1, 0)


def several_results(x: Tensor) -> Tensor:
    values, places = x.max(1)
    return values + places


def written_into(x: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.preserve_format)
    y.copy_(x).mul_(2).add_(x, alpha=3)
    return y.sum()[None]


def types_and_scalars(x: Tensor) -> Tensor:
    y = x.to(torch.bfloat16).float() * 2 + 1.5
    return torch.nn.functional.pad(y.clamp(min=-1), [1, 0, 0, 2], value=1).contiguous() ** 2


def kernel(x: Tensor) -> Tensor:
    return column_means(x, 1, 4, 2)


@pytest.mark.parametrize("isa", NAMES)
@pytest.mark.parametrize("function", [lists, indices, several_results, written_into, types_and_scalars, kernel])
def test_the_same_calls(function: Callable[[Tensor], Tensor], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.kernels(isa) is None:
        pytest.skip(f"no {isa} here")
    monkeypatch.setenv("HARMOQ_CPU_KERNELS", isa)
    given, other = image(1), image(2)
    first, replay = record(function, given)
    assert torch.equal(first, function(given))
    assert torch.equal(replay(other), function(other))
    assert torch.equal(other, image(2))
    with ThreadPoolExecutor(4) as pool:
        for seed, result in enumerate(pool.map(replay, [image(n) for n in range(16)])):
            assert torch.equal(result, function(image(seed)))


def test_gradients_are_not_recorded() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 3))
    _, replay = record(lambda x: x @ weight, image(1))
    assert not replay(image(2).requires_grad_()).requires_grad


@pytest.mark.parametrize("other", [image(1, torch.float64), image(1)[:3], image(1).t().contiguous().t()])
def test_it_takes_what_was_recorded(other: Tensor) -> None:
    _, replay = record(lists, image(1))
    assert replay.takes(image(2))
    assert not replay.takes(other)


def test_values_that_are_read_are_refused() -> None:
    for function in (lambda x: x * float(x.sum()), lambda x: x + (x > 0).any().item()):
        with pytest.raises(NotReplayableError, match="no tensor"):
            record(function, image(1))


def test_results_from_elsewhere_are_refused() -> None:
    outside = image(3)
    with pytest.raises(NotReplayableError, match="no tensor that an operator gave"):
        record(lambda _: outside, image(1))


def test_errors_of_the_function_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        record(lambda x: x @ x, image(1))


def test_nothing_of_the_example_is_kept() -> None:
    def twice(x: Tensor) -> Tensor:
        between.append(weakref.ref(y := x + 1))
        return y * 2

    between: list[weakref.ref[Tensor]] = []
    given = image(1)
    kept = weakref.ref(given)
    result, replay = record(twice, given)
    del given, result
    gc.collect()
    assert kept() is None
    assert between[0]() is None
    assert torch.equal(replay(image(2)), (image(2) + 1) * 2)


def test_malformed_calls_are_refused() -> None:
    def made(*steps: tuple[str, Any]) -> None:
        calls = getattr(torch.classes, library.required().name).Replay()
        for name, arguments in steps:
            getattr(calls, name)(*arguments)

    add, mul, cat = (
        ("call", (f"aten::{name}", kind)) for name, kind in (("add", "Tensor"), ("mul", "Tensor"), ("cat", ""))
    )
    slot, one = ("slot", (0,)), ("constant", (1,))
    for steps in (
        (slot,),
        (("call", ("aten::no_such", "")),),
        (add, ("slot", (1,))),
        (add, ("constant", ("text",))),
        (add, slot, slot, ("constant", ("text",))),
        (add, slot, slot, one, one),
        (mul, slot, ("finish", (0,))),
        (mul, slot, mul),
        (mul, ("list", (2,))),
        (cat, ("list", (2,)), slot, ("finish", (0,))),
        (cat, ("list", (-1,))),
        (("finish", (1,)),),
        (("finish", (0,)), add, slot),
        (("run", (image(1),)),),
        (mul, slot, slot, ("results", (2,)), ("finish", (2,)), ("run", (image(1),))),
    ):
        with pytest.raises(RuntimeError):
            made(*steps)
