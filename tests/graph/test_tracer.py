"""What authors write in a forward, one small module per behaviour; each must equal its original bit for bit."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from harmoq_ao.common.errors import TraceError
from harmoq_ao.graph import (
    Contraction,
    IslandState,
    Phase,
    island_state,
    make_island,
    same_values,
    without_fast_path,
)
from harmoq_ao.graph.contractions import SourceKey

SIZES = ((1, 8, 8), (3, 8, 8), (2, 16, 8), (1, 5, 7), (2, 12, 20))


class Product(nn.Module):
    """A stand-in site that computes the contraction it replaces."""

    def __init__(self, contraction: Contraction, root: nn.Module) -> None:
        super().__init__()
        self.op = contraction.op
        self.equation = contraction.args[0] if contraction.op == "einsum" else None
        self.weight = contraction.weight
        self.root = [root]
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.op == "einsum":
            return torch.einsum(self.equation, *args)
        if self.op == "linear" and self.weight is not None:
            owner, _, name = self.weight.rpartition(".")
            return F.linear(args[0], getattr(self.root[0].get_submodule(owner), name), args[1])
        functions = {"sdpa": F.scaled_dot_product_attention, "linear": F.linear, "conv2d": F.conv2d}
        function: Callable[..., Any] = functions.get(self.op) or getattr(torch, self.op)
        return function(*args, **kwargs)


class Factory:
    """Puts a :class:`Product` at every contraction."""

    def __init__(self) -> None:
        self.known: dict[SourceKey, str] = {}
        self.met: list[Contraction] = []

    def __call__(self, root: nn.Module, contraction: Contraction) -> str:
        if contraction.key not in self.known:
            name = f"harmoq_{contraction.op}_{len(self.known)}"
            root.add_module(name, Product(contraction, root))
            self.known[contraction.key] = name
            self.met.append(contraction)
        return self.known[contraction.key]


def island(module: nn.Module, **settings: Any) -> tuple[nn.Module, Factory]:
    """A copy of a module as an island with a site at every contraction."""
    twin, factory = copy.deepcopy(module).eval(), Factory()
    make_island(twin, IslandState("island", factory, **{"strict": True, **settings}))
    return twin, factory


def check(module: nn.Module, inputs: Callable[[int, int, int], tuple[Any, ...]] | None = None) -> Any:
    """Compare island and original at all sizes, twice, in both phases; return (island, factory)."""
    module = module.eval()
    make = inputs or (lambda b, h, w: (torch.randn(b, h, w, 12),))
    for phase in reversed(Phase):
        twin, factory = island(module, phase=phase)
        with torch.no_grad():
            for size in SIZES * 2:
                args = make(*size)
                mine = copy.deepcopy(args)
                assert same_values(module(*args), twin(*mine)), size
                assert same_values(args, mine), f"arguments were written differently at {size}"
        assert factory.known, "no contraction was found"
    return twin, factory


def follow(module: nn.Module, twin: nn.Module, *calls: Any, seed: int | None = None) -> None:
    """Give both modules the same arguments, and the same random numbers."""
    for call in calls:
        args = call if isinstance(call, tuple) else (call,)
        outputs = []
        for either in (module, twin):
            if seed is not None:
                torch.manual_seed(seed)
                np.random.seed(seed)
            with torch.no_grad():
                outputs.append(either(*args))
        assert same_values(*outputs)


def variants(twin: nn.Module) -> list[Any]:
    return island_state(twin).all_variants()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(12, 36)
        self.heads = 2

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v


# --- branches ---------------------------------------------------------------------------------------------------------


class SizeBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        tokens = x.view(b, h * w, c)
        if h > w:
            tokens = tokens.flip(1) * 2
        return attend(*self.split(tokens)).view(b, h, w, c)


def test_branch_on_size_traces_a_second_variant_with_the_same_sites() -> None:
    twin, factory = check(SizeBranch())
    assert len(variants(twin)) == 2
    assert len(factory.known) == 2
    targets = [{n.target for n in v.graph.nodes if n.op == "call_module"} for v in variants(twin)]
    assert targets[0] == targets[1]


class MaskedBranch(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, shift: int = 0, mode: str = "add") -> Tensor:
        q, k, v = self.split(x)
        scores = q @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask if mode == "add" else scores * mask
        if shift > 0:
            scores = torch.roll(scores, shift, dims=-1)
        return scores.softmax(-1) @ v


def test_calling_patterns() -> None:
    module = MaskedBranch().eval()
    twin, factory = island(module)
    with torch.no_grad():
        for n in (4, 9):
            x, mask = torch.randn(2, n, 12), torch.randn(n, n)
            for args, kwargs in (
                ((x,), {}),
                ((x, mask), {}),
                ((x, None), {"shift": 2}),
                ((x, None), {"shift": 3}),
                ((x,), {"mask": mask, "mode": "mul"}),
            ):
                assert torch.equal(module(*args, **kwargs), twin(*args, **kwargs))
    assert len(factory.known) == 2
    assert len(variants(twin)) == 4  # shift 2 and 3 share a graph


class DataBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = attend(*self.split(x.view(b, h * w, c))).view(b, h, w, c)
        return y * 2 if (x > 2.5).any() else y


def test_branch_on_data_is_followed_in_both_directions() -> None:
    module = DataBranch().eval()
    twin, _ = island(module)
    low, high = torch.zeros(1, 4, 4, 12), torch.full((1, 4, 4, 12), 3.0)
    follow(module, twin, low, high, low, high)
    assert len(variants(twin)) == 2


# --- loops, tuples, numbers -------------------------------------------------------------------------------------------


class Windows(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        parts = []
        for window in torch.split(x.view(b, h * w, c), (h * w + 1) // 2, dim=1):
            parts.append(attend(*self.split(window)))
        return torch.cat(parts, 1).view(b, h, w, c)


def test_loops_give_one_site_per_round() -> None:
    _, factory = check(Windows())
    assert sorted(key.occurrence for key in factory.known) == [0, 1, 2, 3]  # two products on one line, twice


class Unpacking(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.size()
        q, k, v = map(  # noqa: C417 - as authors write it
            lambda t: t.reshape(b, h * w, self.heads, -1).transpose(1, 2), self.qkv(x).chunk(3, dim=-1)
        )
        stacked = torch.stack((q, k, v))
        first, *rest = (t for t in stacked)
        return attend(first, rest[0], rest[1]).transpose(1, 2).reshape(b, h, w, -1)


class Numbers(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        side = int(b * h / b)
        rows = math.ceil(side / 4) * 4
        x = F.pad(x, (0, 0, 0, 0, 0, rows - side))
        scale = 1 / math.sqrt(h * w) + np.sqrt(w) + float(np.float32(0.5)) * np.int64(3)
        largest = max(h, w, min(rows, 3)) % 5 + abs(-h) // 2 + round(w / 3)
        q, k, v = self.split(x.view(-1, rows * w, c))
        out = attend(q * scale, k, v + largest).view(b, rows, w, c)
        return out[:, : x.shape[1] - (rows - side)] * len(out)


class Einops(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b h w (n c) -> b n (h w) c", n=self.heads) for t in self.split(x))
        return rearrange(attend(q, k, v), "b n (h w) c -> b h w (n c)", h=x.shape[1])


class Factories(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
        bias = (grid[0][:, None] - grid[0][None]).abs().to(x.dtype)
        mask = torch.zeros((h * w, h * w), device=x.device, dtype=x.dtype)
        mask[: h * w // 2, h:] = -1.0
        mask += torch.ones(1) * bias
        q, k, v = self.split(x.view(b, h * w, c))
        scores = q @ k.transpose(1, 2) + mask + x.new_zeros(1)
        return torch.empty_like(x).copy_((scores.softmax(-1) @ v).view_as(x))


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        q, k, v = self.split(x.reshape(b, h * w, c))
        scores = q @ k.transpose(1, 2)
        scores *= 0.5
        scores[:, 0] = scores[:, 0] + 1
        scores.add_(1).mul_(2)
        F.relu(scores[:, 1:], inplace=True)
        out = scores.softmax(-1) @ v
        out[:, : h // 2].zero_()
        return out


class ArgumentWrite(Base):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        b, h, w, c = x.shape
        return attend(*self.split(x.view(b, h * w, c)))


@pytest.mark.parametrize("cls", [Unpacking, Numbers, Einops, Factories, InPlace, ArgumentWrite])
def test_python_of_authors(cls: type[Base]) -> None:
    check(cls())


def test_graphs_do_not_multiply_with_sizes() -> None:
    module = Factories().eval()
    twin, _ = island(module)
    follow(module, twin, *(torch.randn(1, h, 3 + h % 4, 12) for h in range(3, 14)))
    assert len(variants(twin)) == 1


# --- helpers ----------------------------------------------------------------------------------------------------------


def helper_with_matmul(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-2, -1))


TABLE = {n: 1.0 + n / 8 for n in range(64)}  # looking up a number that depends on the image cannot be traced


def stubborn_helper(x: Tensor) -> Tensor:
    return x * TABLE[x.shape[1]]


def stubborn_product(x: Tensor) -> Tensor:
    return x @ torch.eye(x.shape[-1]) * TABLE[x.shape[1]]


def maybe_mask(h: int, w: int) -> Tensor | None:
    assert TABLE[h] > 0
    return torch.as_tensor(np.full((h * w, h * w), 0.25, dtype=np.float32)) if h > w else None


class UsesHelper(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return helper_with_matmul(q, k).softmax(-1) @ v


class UsesStubborn(Base):
    def __init__(self, product: bool) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.split(stubborn_product(x) if self.product else stubborn_helper(x)))


class UsesMaybe(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        mask = maybe_mask(h, w)
        q, k, v = self.split(x.view(b, h * w, c))
        scores = q @ k.transpose(1, 2)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ v


def test_sites_inside_helpers_are_found() -> None:
    twin, factory = check(UsesHelper())
    assert {key.function for key in factory.known} == {"helper_with_matmul", "UsesHelper.forward"}
    assert [c.left_is_softmax for c in factory.met] == [False, True]
    assert variants(twin)[0].opaque == ()


@pytest.mark.parametrize("product", [False, True])
def test_a_helper_that_cannot_be_traced_becomes_opaque_and_its_contractions_are_told(product: bool) -> None:
    twin, factory = check(UsesStubborn(product))
    assert variants(twin)[0].opaque == ("stubborn_product" if product else "stubborn_helper",)
    assert variants(twin)[0].hidden == (("stubborn_product: matmul",) if product else ())
    assert len(factory.known) == 2 + product


def test_a_helper_that_returns_none_at_some_sizes() -> None:
    twin, _ = check(UsesMaybe())
    assert len(variants(twin)) == 2


# --- what stays float -------------------------------------------------------------------------------------------------


class Untraceable(Base):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.count = way, 0
        self.cache: list[int] = []
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        factor: Any = 1.0
        if self.way == "table":
            factor = TABLE[x.shape[1]]
        elif self.way == "state":
            self.count = self.count + 1
            factor = self.count
        elif self.way == "buffer":
            self.seen.add_(1)
            factor = self.seen
        elif self.way == "list":
            self.cache.append(1)
            factor = len(self.cache)
        elif self.way == "random":
            factor = float(np.random.rand())
        return attend(*self.split(x)) * factor


@pytest.mark.parametrize("way", ["table", "state", "buffer", "list", "random"])
def test_untraceable_forwards_stay_as_written(way: str) -> None:
    module = Untraceable(way).eval()
    twin, _ = island(module, strict=False)
    follow(module, twin, *(torch.randn(2, n, 12) for n in (4, 6, 4)), seed=0)
    assert island_state(twin).float_reason is not None
    if way == "table":
        line = Untraceable.forward.__code__.co_firstlineno + 3
        assert f"{Path(__file__).name}:{line}" in str(island_state(twin).float_reason)
    strict, _ = island(Untraceable(way))
    with pytest.raises(TraceError):
        strict(torch.randn(2, 4, 12))


class Stores(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        self.h, self.w = h, w
        self.map = self.split(x.view(b, h * w, c))[0]
        return attend(self.map, self.map, self.map).view(b, self.h, self.w, c)


def test_attributes_that_are_only_stored() -> None:
    twin, _ = check(Stores())
    x = torch.randn(1, 6, 7, 12)
    twin(x)
    assert (twin.h, twin.w) == (6, 7)
    assert isinstance(twin.map, Tensor)


class ReadsSize(Base):
    size = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.size
        return attend(*self.split(x.view(x.shape[0], h * w, -1)))


def test_attributes_that_others_change_are_guarded() -> None:
    module = ReadsSize().eval()
    twin, _ = island(module)
    for size in ((4, 4), (3, 5), (4, 4), (5, 3)):
        module.size = twin.size = size
        follow(module, twin, torch.randn(2, *size, 12))


def test_training_mode_is_another_graph() -> None:
    class Drops(Base):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(attend(*self.split(x)), 0.5, self.training)

    module = Drops().eval()
    twin, _ = island(module)
    x = torch.randn(2, 4, 12)
    follow(module, twin, x)
    module.train()
    twin.train()
    follow(module, twin, x, seed=1)  # tracing leaves the random generator where it was


def test_random_numbers_are_drawn_anew() -> None:
    class Noise(Base):
        def forward(self, x: Tensor) -> Tensor:
            return attend(*self.split(x)) + torch.randn(3)[0] * torch.rand_like(x)

    module = Noise().eval()
    twin, _ = island(module)
    x = torch.randn(2, 4, 12)
    for seed in (1, 2, 1):
        follow(module, twin, x, seed=seed)


def test_arguments_that_may_change_without_notice_are_refused() -> None:
    class Takes(Base):
        def forward(self, x: Tensor, table: np.ndarray) -> Tensor:
            return attend(*self.split(x)) * float(table[0])

    module = Takes().eval()
    twin, _ = island(module, strict=False)
    table, x = np.ones(3), torch.randn(2, 4, 12)
    for value in (1.0, 5.0):
        table[0] = value
        follow(module, twin, (x, table))


def test_nan_arguments_do_not_multiply_graphs() -> None:
    class Scaled(Base):
        def forward(self, x: Tensor, factor: float) -> Tensor:
            return attend(*self.split(x)) * (factor if factor > 0 else -1.0)

    module = Scaled().eval()
    twin, _ = island(module)
    x = torch.randn(2, 4, 12)
    nan = float("nan")
    follow(module, twin, *((x, factor) for factor in (nan, 1.0, nan, -2.0, nan, 0.5)))
    assert len(variants(twin)) == 2


# --- ways to contract -------------------------------------------------------------------------------------------------


def _tokens(b: int, h: int, w: int) -> tuple[Tensor]:
    return (torch.randn(b, h * w, 12),)


class Contracts(Base):
    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.product(self.product(q, k.transpose(-2, -1)).softmax(-1), v)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda a, b: a @ b,
    "matmul": torch.matmul,
    "method": lambda a, b: a.matmul(b),
    "bmm": torch.bmm,
    "bmm method": lambda a, b: a.bmm(b),
    "baddbmm": lambda a, b: torch.baddbmm(torch.ones(1, 1, 1), a, b, beta=0.5, alpha=2),
    "einsum": lambda a, b: torch.einsum("bij,bjk->bik", a, b),
    "einsum list": lambda a, b: torch.einsum("bij,bjk->bik", [a, b]),
    "mm": lambda a, b: torch.stack([torch.mm(a[0], b[0])] * a.shape[0]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_ways_to_multiply(name: str) -> None:
    _, factory = check(Contracts(PRODUCTS[name]), _tokens)
    assert len(factory.known) >= 1
    assert all(c.depends_on_input for c in factory.met)


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.qkv.bias[:12], torch.zeros(12), self.qkv.bias[24:]))
        qkv = F.linear(input=x, weight=self.qkv.weight, bias=bias)
        return attend(*qkv.chunk(3, -1))


def test_linear_with_the_weight_of_a_child() -> None:
    _, factory = check(Functional(), _tokens)
    assert [c.weight for c in factory.met if c.op == "linear"] == ["qkv.weight"]


class Sdpa(Base):
    def __init__(self, mask: str | None, scale: float | None) -> None:
        super().__init__()
        self.mask, self.scale = mask, scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        mask = None
        if self.mask == "bool":
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        elif self.mask == "float":
            mask = torch.arange(x.shape[1]).to(x)[None] * 0.1
            mask = mask.expand(x.shape[1], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_scaled_dot_product_attention(mask: str | None, scale: float | None) -> None:
    _, factory = check(Sdpa(mask, scale), _tokens)
    assert [c.op for c in factory.met] == ["sdpa"]


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights: bool) -> None:
    module = nn.MultiheadAttention(12, 2, batch_first=True).eval()
    twin, factory = island(module)
    with torch.no_grad(), without_fast_path():
        for n in (4, 7):
            x, memory = torch.randn(3, n, 12), torch.randn(3, n + 2, 12)
            for args in ((x, memory, memory), (x, x, x)):
                expected = module(*args, need_weights=need_weights)
                actual = twin(*args, need_weights=need_weights)
                assert same_values(expected, actual)
    assert {"linear"} < {c.op for c in factory.met}


# --- structure --------------------------------------------------------------------------------------------------------


class Parent(Base):
    @property
    def scale(self) -> float:
        return self.heads**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.split(x)) * self.scale


class Child(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def test_properties_and_super() -> None:
    _, factory = check(Child(), _tokens)
    assert all("attend" in key.function for key in factory.known)


class Nested(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Parent()
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.split(self.inner(x) + self.again(x)))


def test_islands_inside_islands_and_under_two_names() -> None:
    module = Nested().eval()
    twin, outer = island(module)
    inner = Factory()
    make_island(twin.inner, IslandState("inner", inner, strict=True))
    follow(module, twin, torch.randn(2, 4, 12), torch.randn(2, 9, 12))
    assert len(outer.known) == len(inner.known) == 2
    assert twin.inner is twin.again


def test_deep_copies_are_independent() -> None:
    module = SizeBranch().eval()
    twin, _ = island(module)
    x = torch.randn(1, 4, 6, 12)
    twin(x)
    other = copy.deepcopy(twin)
    with torch.no_grad():
        other.qkv.weight.zero_()
    assert torch.equal(twin(x), module(x))
    assert not torch.equal(other(x), module(x))
    wide = torch.randn(1, 6, 4, 12)
    other(wide)
    assert len(variants(other)) == 2
    assert len(variants(twin)) == 1


class WithConstant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.split(x)) + torch.from_numpy(np.array([1 / 3], dtype=np.float32))


def test_another_float_type_and_back() -> None:
    module = WithConstant().eval()
    twin, _ = island(module)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        module.to(dtype)
        twin.to(dtype)
        follow(module, twin, torch.randn(2, 5, 12).to(dtype))  # the constant stays float32, as its author made it


def test_state_dict_and_class_stay_the_authors() -> None:
    module = Parent()
    twin, _ = island(module)
    twin(torch.randn(1, 4, 12))
    assert isinstance(twin, Parent)
    assert list(twin.state_dict()) == list(module.state_dict())


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_new_size_runs_once_where_no_site_observes() -> None:
    twin, _ = island(UsesHelper(), phase=Phase.CONVERTED)
    twin(torch.randn(1, 4, 12))
    sites = [m for m in twin.modules() if isinstance(m, Product)]
    before = [s.calls for s in sites]
    twin(torch.randn(1, 9, 12))  # a new size of a known graph
    assert [s.calls for s in sites] == [n + 1 for n in before]


def test_a_new_size_is_tried_quietly_where_sites_observe() -> None:
    depth = 0

    @contextmanager
    def quiet() -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    loud: list[int] = []
    twin, _ = island(UsesHelper(), quiet=quiet)
    twin.qkv.register_forward_hook(lambda m, i, o: loud.append(1) if depth == 0 else None)
    for n in (4, 9, 9, 16):
        twin(torch.randn(1, n, 12))
    assert len(loud) == 4


class LateGuard(Base):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        y = attend(*self.split(x))
        return y * 2 if x.mean() > 1 else y


@pytest.mark.parametrize("phase", Phase)
def test_a_guard_after_a_write_does_not_write_twice(phase: Phase) -> None:
    module = LateGuard().eval()
    twin, _ = island(module, phase=phase)
    for shift in (-1, 1, -1, 1, 1):
        x = torch.randn(2, 4, 12) + shift
        mine = x.clone()
        assert torch.equal(module(x), twin(mine))
        assert torch.equal(x, mine)
    assert len(variants(twin)) == 2
    assert not variants(twin)[0].restartable


def test_memory_is_bounded() -> None:
    class Endless(Base):
        def forward(self, x: Tensor) -> Tensor:
            return attend(*self.split(x)) * float(x.shape[1])  # a guard on every length

    module = Endless().eval()
    twin, _ = island(module)
    follow(module, twin, *(torch.randn(1, n, 12) for n in range(1, 30)))
    assert len(variants(twin)) <= 16
    assert len(island_state(twin).memo) <= 256


@pytest.mark.parametrize("phase", Phase)
def test_threads_may_share_an_island(phase: Phase) -> None:
    module = SizeBranch().eval()
    twin, _ = island(module, phase=phase)
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        with torch.no_grad():
            for step in range(12):
                h, w = 3 + (seed * 5 + step) % 7, 3 + (seed + 3 * step) % 5
                x = torch.randn(1, h, w, 12, generator=generator)
                assert torch.equal(module(x), twin(x)), f"{h}x{w}"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(variants(twin)) == 2


def test_the_authors_globals_are_theirs_again_after_a_trace() -> None:
    before = dict(globals())
    check(Numbers())
    after = dict(globals())
    assert {k for k in after if k not in before} == set()
    assert all(after[k] is before[k] for k in before)
