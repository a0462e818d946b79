"""Quantized models under `torch.export` and `torch.compile`."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import TraceError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph import is_island, island_state
from harmoq_ao.kernels import ops
from harmoq_ao.sites.quantized import Derived, QuantizedLinear, QuantizedMatmul
from tests.models import PER_TOKEN, converted, images

CONFIGS = {
    "deploy W8A8": HarmoqConfig(8, 8),
    "per token": HarmoqConfig(4, 4, rules=PER_TOKEN),
    "paper W3A3": HarmoqConfig(3, 3, "paper"),
    "weights alone": HarmoqConfig(4, 32),
    "convolutions": HarmoqConfig(4, 8, conv_bits=8),
}


def _calls(module: torch.fx.GraphModule, target: Any) -> int:
    graphs = [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum(node.target == target for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("name", ["SwinIR/light", pytest.param("DAT", marks=pytest.mark.slow)])
def test_an_exported_program_computes_the_same(name: str, config: HarmoqConfig) -> None:
    model = converted(name, config)
    image = images(1)[0]
    with torch.no_grad():
        expected = model(image)
        program = torch.export.export(model, (image,), strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        found = torch.export.load(file).module()(image)
    assert torch.equal(found, expected)
    sites = [s for s in model.sites().values() if isinstance(s, QuantizedLinear) and s.both_quantized]
    called = _calls(program.graph_module, torch.ops.harmoq.linear.default)
    assert (called > 0) == bool(sites)
    assert called <= len(sites)  # those that fold into constants are not called


@pytest.mark.parametrize("name", ["weights alone", "convolutions", "paper W3A3"])
def test_export_right_after_conversion_leaves_the_model_as_it_was(name: str) -> None:
    model, image = converted("SwinIR/light", CONFIGS[name]), images(1)[0]
    program = torch.export.export(model, (image,), strict=False)
    assert all(site._derived == Derived() for site in model.sites().values())
    assert torch.equal(model(image), program.module()(image))


def test_no_float_weight_is_left_in_an_exported_program() -> None:
    model = converted("SwinIR/light", HarmoqConfig(4, 4))
    program = torch.export.export(model, (images(1)[0],), strict=False)
    shapes = {s.site.shape for s in model.sites().values() if isinstance(s, QuantizedLinear)}
    floats = {tuple(t.shape) for t in program.state_dict.values() if t.is_floating_point()}
    assert shapes
    assert not shapes & floats


def test_export_of_a_size_never_seen_says_what_to_do() -> None:
    model = converted("SwinIR/light", HarmoqConfig(8, 8))
    for module in model.modules():
        if is_island(module):
            island_state(module).forget(module)
    with pytest.raises(TraceError, match="run the model once"):
        torch.export.export(model, (images(1)[0],), strict=False)


@pytest.mark.parametrize("profile", ["deploy", "paper"])
def test_islands_compile_as_one_graph(profile: str) -> None:
    model = converted("SwinIR/light", HarmoqConfig(4, 4, profile))  # type: ignore[arg-type]
    seen: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any], Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor) -> None:
        seen.setdefault(type(module).__name__, (module, inputs, options, output))

    islands = [m for m in model.modules() if is_island(m)]
    handles = [m.register_forward_hook(keep, with_kwargs=True) for m in islands]
    model(images(1)[0])
    for handle in handles:
        handle.remove()
    assert seen
    for module, inputs, options, expected in seen.values():
        torch._dynamo.reset()
        with torch.no_grad():
            found = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_operators_pass_torchs_own_checks() -> None:
    model = converted("forms", HarmoqConfig(4, 4, "paper"))
    sites = list(model.sites().values())
    linear = next(s for s in sites if isinstance(s, QuantizedLinear))
    x = torch.randn(5, linear.columns)
    torch.library.opcheck(ops.linear, (x, *linear._tensors(), *linear._numbers(), "auto"))
    product = next(s for s in sites if isinstance(s, QuantizedMatmul) and s.site.shape[0] > 0)
    length = product.site.shape[0]
    operands = torch.randn(2, 3, length), torch.randn(2, length, 4)
    torch.library.opcheck(ops.matmul, (*operands, *product._tensors(), *product._bits(), "auto"))


def test_an_operator_sees_that_its_weights_changed() -> None:
    model = converted("linears", HarmoqConfig(4, 4))
    site = next(s for s in model.sites().values() if isinstance(s, QuantizedLinear) and s.both_quantized)
    x = torch.randn(3, site.columns)
    first = ops.linear(x, *site._tensors(), *site._numbers(), "auto")
    assert torch.equal(first, ops.linear(x, *site._tensors(), *site._numbers(), "auto"))
    site.codes.zero_()
    assert not torch.equal(first, ops.linear(x, *site._tensors(), *site._numbers(), "auto"))
