"""``prepare_harmoq``: rules, examples, what is reported, what is refused; the given model stays as it was."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harmoq_ao import HarmoqConfig, SiteRule, calibrate, prepare_harmoq
from harmoq_ao.common.errors import ConfigError, InputError
from harmoq_ao.recipes.architectures import forward
from harmoq_ao.sites import PreparedLinear
from harmoq_ao.zoo import LoadedModel
from tests.models import converted, entry
from tests.preparation.helpers import SWINIR, Small, prepare


def test_rules_reach_their_sites_and_the_last_match_wins() -> None:
    rules = (SiteRule("*.qkv", act_bits=8), SiteRule("layers.0.*.qkv", weight_bits=32, act_bits=32))
    prepared = prepare(HarmoqConfig(weight_bits=4, act_bits=4, profile="paper", rules=rules))
    for module in prepared.sites():
        settings = prepared.settings(module.site)
        if module.site.name.endswith(".qkv") and module.site.name.startswith("layers.0."):
            assert module.quantizers() == []
            assert module.site.reason is not None
            assert "layers.0.*.qkv" in module.site.reason.text
        elif module.site.name.endswith(".qkv"):
            assert (settings.act.bits, settings.weight.bits) == (8, 4)
        else:
            assert settings.act.bits == 4


def test_a_rule_without_sites_lists_near_misses() -> None:
    with pytest.raises(ConfigError, match="qkv") as error:
        prepare(HarmoqConfig(rules=(SiteRule("*.qvk", act_bits=8),)))
    assert ".attn.qkv" in str(error.value.expected)
    with pytest.raises(ConfigError):
        prepare(HarmoqConfig(rules=(SiteRule("*.qkv", kind="matmul", act_bits=8),)))


@pytest.mark.parametrize(
    ("examples", "shapes"),
    [
        (None, [(1, 3, 64, 64), (1, 3, 48, 72)]),
        (SWINIR.example(), [(1, 3, 16, 16)]),
        ([SWINIR.example((16, 16)), SWINIR.example((19, 13), 3)], [(1, 3, 16, 16), (3, 3, 19, 13)]),
        ((SWINIR.example((16, 24)),), [(1, 3, 16, 24)]),
    ],
    ids=["none", "tensor", "list", "tuple"],
)
def test_examples(examples: Any, shapes: list[tuple[int, ...]]) -> None:
    prepared = prepare_harmoq(SWINIR.build(), example_inputs=examples)
    assert prepared.example_shapes == shapes
    assert len(prepared.sites()) == 24


@pytest.mark.parametrize(
    "examples",
    [
        [],
        torch.rand(1, 3, 16),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.full((1, 3, 16, 16), float("nan")),
        [np.zeros((1, 3, 16, 16), dtype=np.float32)],
        np.zeros((1, 3, 16, 16), dtype=np.float32),
        "image.png",
    ],
)
def test_wrong_examples_are_refused(examples: Any) -> None:
    with pytest.raises(InputError):
        prepare(example_inputs=examples)


def test_examples_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(InputError, match="does not run"):
        prepare_harmoq(Small(), None, torch.rand(1, 1, 16, 16))  # it takes three channels


@pytest.mark.parametrize("model", [None, "SwinIR", {"params": 1}, SimpleNamespace(model="no module")])
def test_wrong_models_are_refused(model: Any) -> None:
    with pytest.raises(InputError):
        prepare_harmoq(model)


def test_a_prepared_model_is_not_prepared_again() -> None:
    prepared = prepare()
    for again in (prepared, prepared.model):
        with pytest.raises(InputError, match="prepared already"):
            prepare_harmoq(again)


@pytest.mark.parametrize("profile", ["deploy", "paper"])
def test_the_given_model_stays_as_it_was(profile: Any) -> None:
    model = SWINIR.build().train()
    classes = [type(m) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    prepared = prepare_harmoq(model, HarmoqConfig(4, 4, profile), SWINIR.example())
    calibrate(prepared, [SWINIR.example()], show_progress=False)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 32), (32, 4), (4, 16), (3, 8), (32, 32)])
def test_either_side_may_stay_float(weight_bits: int, act_bits: int) -> None:
    prepared = prepare(HarmoqConfig(weight_bits=weight_bits, act_bits=act_bits, profile="paper"))
    for module in prepared.sites():
        if isinstance(module, PreparedLinear):
            assert (module.weight_quantizer is not None) == (weight_bits < 16)
            assert (module.act_quantizer is not None) == (act_bits < 16)
    model, image = SWINIR.build(), SWINIR.example((16, 24), 2, seed=4)
    assert torch.equal(forward(model, image), forward(prepared, image))
    if (weight_bits, act_bits) != (32, 32):
        calibrate(prepared, [SWINIR.example()], show_progress=False)
        assert not torch.equal(forward(model, image), forward(prepared, image))


def test_report() -> None:
    prepared = prepare(HarmoqConfig(weight_bits=4, act_bits=8, profile="paper"))
    report = prepared.report()
    names = [m.site.name for m in prepared.sites()]
    assert [r.name for r in report.rows[: len(names)]] == names
    row = next(r for r in report.rows if r.name == "layers.0.residual_group.blocks.0.attn.qkv")
    assert (row.kind, row.shape, row.weight_bits, row.act_bits, row.reason) == ("linear", (36, 12), 4, 8, None)
    assert row.macs == 16 * 16 * 36 * 12
    assert row.bounds is None
    convolution = next(r for r in report.rows if r.kind == "conv2d")
    assert convolution.reason is not None
    assert convolution.macs > 0
    assert 0 < report.macs_share < 1
    calibrate(prepared, [SWINIR.example()], show_progress=False)
    row = next(r for r in prepared.report().rows if r.name == row.name)
    assert isinstance(row.bounds, tuple)
    assert row.bounds[0] < row.bounds[1]
    assert row.sqnr_db is not None
    assert row.sqnr_db > 5


def test_a_model_in_bfloat16() -> None:
    model = Small().eval().to(torch.bfloat16)
    prepared = prepare_harmoq(model, HarmoqConfig(weight_bits=4, act_bits=4, profile="paper"))
    for size in ((6, 6), (7, 9), (16, 16)):
        image = torch.rand(2, 3, *size).to(torch.bfloat16)
        assert torch.equal(forward(model, image), forward(prepared, image))
    calibrate(prepared, [torch.rand(1, 3, 6, 6).to(torch.bfloat16)], show_progress=False)
    assert torch.isfinite(prepared(image)).all()


def test_traits_of_models_spandrel_descriptors_and_loaded_models() -> None:
    assert prepare().traits.scale == 2
    model = SWINIR.build()
    descriptor = SimpleNamespace(model=model, scale=2)
    assert prepare_harmoq(descriptor, None, SWINIR.example()).traits.scale == 2  # type: ignore[arg-type]
    loaded = LoadedModel(model, "SwinIR", 2, 3, 3, size_multiple=8, size_minimum=16)
    prepared = prepare_harmoq(loaded, None, SWINIR.example())  # type: ignore[arg-type]
    assert (prepared.traits.scale, prepared.traits.size_multiple, prepared.traits.size_minimum) == (2, 8, 16)


def test_a_converted_model_may_be_shared_by_threads() -> None:
    quantized = converted("DAT/light", HarmoqConfig(8, 8))
    images = [entry("DAT/light").example((11 + 3 * i, 23 - 2 * i), seed=i) for i in range(8)]
    expected = [copy.deepcopy(quantized)(image) for image in images]
    start = threading.Barrier(4)

    def work(first: int) -> list[Tensor]:
        start.wait()
        return [quantized(image) for image in images[first::4]]

    with ThreadPoolExecutor(4) as pool:
        for first, actual in enumerate(pool.map(work, range(4))):
            assert all(torch.equal(a, b) for a, b in zip(actual, expected[first::4], strict=True))


def test_quantizers_lie_where_the_model_is() -> None:
    prepared = prepare(HarmoqConfig(4, 4, "paper"))
    for site in prepared.sites():
        site.attach_quantizers(prepared.config, torch.device("meta"))
        tensors = [t for q in site.quantizers() for t in (*q.parameters(), *q.buffers())]
        assert tensors
        assert all(t.is_meta for t in tensors)


def test_a_module_that_its_author_called_output_is_no_name_of_one() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.output = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.output(self.inner(x.movedim(1, -1))).movedim(-1, 1)
            return result

    assert prepare_harmoq(Named(), None, torch.rand(1, 3, 4, 4)).traits.output is None
