"""Every architecture: equal to the original bit for bit when prepared, every contraction accounted for, convertible."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from harmoq_ao import HarmoqConfig, calibrate, convert_harmoq, disable_fake_quant, prepare_harmoq
from harmoq_ao.graph import is_island, island_state
from harmoq_ao.recipes.architectures import ARCHITECTURES, Architecture, forward
from harmoq_ao.sites import PreparedLinear, PreparedMatmul
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.site import FloatCause
from tests.models import entry

#: Written independently of the tracer: everything torch offers to multiply two matrices with, by name.
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "baddbmm", "addbmm", "addmm", "einsum", "mv", "dot"}
PRODUCTS |= {"linear", "scaled_dot_product_attention", "tensordot", "bilinear", "inner", "multi_head_attention_forward"}


class _Counter(TorchFunctionMode):
    """Counts products by the innermost module that runs; a composite function of torch counts once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.stack: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, i, name=name: self.stack.append(name))
            module.register_forward_hook(lambda m, i, o: self.stack.pop() and None, always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in PRODUCTS:
            self.found[self.stack[-1]] += 1
        return func(*args, **(kwargs or {}))


def _prepare(architecture: Architecture, examples: list[torch.Tensor] | None = None) -> PreparedModel:
    config = HarmoqConfig(weight_bits=4, act_bits=4, profile="paper")
    given = examples or [architecture.example(size) for size in architecture.sizes[:2]]
    return prepare_harmoq(architecture.build(), config, given)


def _accounted(prepared: PreparedModel) -> Counter[str]:
    """Sites and float entries by the module they belong to."""
    names = []
    for module in prepared.sites():
        site = module.site
        names.append(site.module_name)
        if "::sdpa" in site.name and site.name.endswith(".av"):  # two sites of one call
            names.pop()
    names += [f.name.partition("::")[0] for f in prepared.floats if f.kind in ("linear", "matmul")]
    return Counter(names)


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, marks=pytest.mark.slow if a.name in ("Uformer", "DCTLSA") else ())  # a quarter of a minute each
        for a in ARCHITECTURES
    ],
    ids=lambda a: a.name,
)
def test_architecture(architecture: Architecture) -> None:
    original = architecture.build()
    prepared = _prepare(architecture)
    disable_fake_quant(prepared)
    for size in architecture.sizes:
        for batch in architecture.batches:
            image = architecture.example(size, batch, seed=3)
            assert torch.equal(forward(original, image), forward(prepared, image)), f"{size} x {batch}"
    _check_everything_is_accounted_for(architecture, prepared)
    calibrate(prepared, [architecture.example(seed=5), architecture.example(seed=6)], show_progress=False)
    quantized = convert_harmoq(prepared)
    image = architecture.example(architecture.sizes[-1], seed=9)
    output = forward(quantized, image)
    assert output.shape == forward(original, image).shape
    assert bool(torch.isfinite(output).all())


def _check_everything_is_accounted_for(architecture: Architecture, prepared: PreparedModel) -> None:
    assert not [f for f in prepared.floats if f.reason.cause is FloatCause.UNTRACED]
    assert all(f.reason.text for f in prepared.floats)
    original = architecture.build()
    counter = _Counter(original)
    with counter:
        forward(original, architecture.example())
    accounted = _accounted(prepared)
    sites = {m.site.name for m in prepared.sites()}
    floats = {f.name for f in prepared.floats}
    for name, module in original.named_modules():
        if type(module) is nn.Linear and counter.found[name]:
            assert name in sites or name in floats, f"{name} runs and is not listed"
        elif counter.found[name]:
            places = counter.found[name]
            assert accounted[name], f"{places} products of {name} are not listed"
            if is_island(prepared.model.get_submodule(name)):
                graphs = island_state(prepared.model.get_submodule(name)).all_variants()
                assert max(g.contractions for g in graphs) == accounted[name]
                assert not any(g.hidden for g in graphs)
    assert len(sites) == len(prepared.sites())  # names are unique
    assert not sites & floats


@pytest.mark.parametrize("name", ["SwinIR/light", "DAT", "HAT", "OmniSR", "GRL", "RGT", "ATD", "CRAFT"])
def test_site_names_are_stable(name: str) -> None:
    architecture = entry(name)
    first = [m.site.name for m in _prepare(architecture).sites()]
    assert first == [m.site.name for m in _prepare(architecture).sites()]
    reversed_sizes = [architecture.example(size) for size in architecture.sizes[:0:-1]]
    assert set(first) == {m.site.name for m in _prepare(architecture, reversed_sizes).sites()}


@pytest.mark.parametrize("name", ["SwinIR/light", "DAT/light"])
def test_graphs_do_not_multiply_over_many_sizes(name: str) -> None:
    architecture = entry(name)
    original, prepared = architecture.build(), _prepare(architecture)
    generator = torch.Generator().manual_seed(0)
    for index in range(30):
        height, width = torch.randint(9, 33, (2,), generator=generator).tolist()
        image = architecture.example((height, width), batch=1 + index % 2, seed=index)
        if index % 6 == 0:
            assert torch.equal(forward(original, image), forward(prepared, image))
        else:
            forward(prepared, image)
    islands = [island_state(m) for m in prepared.model.modules() if is_island(m)]
    assert max(len(state.all_variants()) for state in islands) <= 4
    assert max(len(state.memo) for state in islands) <= 256


def test_attention_products_have_roles() -> None:
    products = [m.site for m in _prepare(entry("SwinIR/light")).sites() if isinstance(m, PreparedMatmul)]
    assert [s.role for s in products] == ["query-key", "attention-value"] * (len(products) // 2)
    assert {s.shape for s in products} == {(6,), (64,)}


def test_functional_linears_share_the_authors_weight() -> None:
    prepared = _prepare(entry("Swin2SR"))
    shared = [m for m in prepared.sites() if isinstance(m, PreparedLinear) and "::linear" in m.site.name]
    assert len(shared) == 4
    for module in shared:
        owner = prepared.model.get_submodule(module.site.module_name)
        assert module.weight is owner.qkv.weight
        x = torch.rand(3, module.in_features)
        assert torch.equal(module(x), F.linear(x, owner.qkv.weight))
