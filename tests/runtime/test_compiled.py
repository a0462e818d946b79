"""Quantized models through `torch.compile`: what it is shown, and that the numbers stay the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError, InputError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.kernels import ops
from harmoq_ao.kernels.compiler_view import for_compiler
from harmoq_ao.lowering.attention import blocked_attention, fused_attention
from harmoq_ao.runtime.compiled import compile_model
from harmoq_ao.runtime.fixed_size import fixed_size
from harmoq_ao.sites.quantized import QuantizedLinear
from tests.compilers import needs_compiler, run_without_compiler, trace_only
from tests.models import converted, images


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C++, which takes a minute."""
    trace_only(monkeypatch)


def _calls(graph: torch.fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("SwinIR/light", 8),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("SwinIR/light", 2), ("DAT", 8), ("HAT", 4))),
    ],
)
def test_the_same_numbers_at_every_size(name: str, bits: int, without_code: None) -> None:
    model = converted(name, HarmoqConfig(bits, bits))
    fast = compile_model(model)
    for size in ((16, 16), (19, 13), (16, 16)):
        for image in images(2, size):
            assert torch.equal(fast(image), model(image))
    assert len(fast._programs) == 2


@pytest.mark.parametrize(
    "config",
    [
        HarmoqConfig(4, 32),
        pytest.param(HarmoqConfig(32, 4), marks=pytest.mark.slow),
        pytest.param(HarmoqConfig(4, 4, conv_bits=8), marks=pytest.mark.slow),
        HarmoqConfig(4, 4, "paper", relative_maps=True),
        pytest.param(HarmoqConfig(4, 4, "paper"), marks=pytest.mark.slow),
    ],
)
def test_whatever_is_quantized(config: HarmoqConfig, without_code: None) -> None:
    model, image = converted("SwinIR/light", config), images(1)[0]
    assert torch.equal(compile_model(model)(image), model(image))


@pytest.mark.slow
def test_bfloat16_is_as_near(without_code: None) -> None:
    model, image = converted("DAT/light", HarmoqConfig(8, 8), torch.bfloat16), images(1)[0]
    expected = model(image)
    assert (compile_model(model)(image) - expected).abs().mean() <= 0.01 * expected.std()


def test_rounding_is_the_compilers_and_contracting_ours() -> None:
    model, image = converted("SwinIR/light", HarmoqConfig(4, 4), torch.bfloat16), images(1)[0]
    linears = [s for s in model.sites().values() if isinstance(s, QuantizedLinear)]
    plain = _calls(fixed_size(model, image).graph)
    with for_compiler():
        shown = _calls(fixed_size(model, image).graph)
    assert plain["harmoq.linear.default"] == shown["harmoq.contract.default"] == len(linears)
    assert shown["aten.round.default"] == len(linears)
    assert "harmoq.linear.default" not in shown
    assert shown["harmoq.blocked_attention.default"] == plain["aten.scaled_dot_product_attention.default"] > 0


def test_torch_compile_itself_is_shown_the_same() -> None:
    model, image = converted("SwinIR/light", HarmoqConfig(4, 4), torch.bfloat16), images(1)[0]
    expected = model(image)
    seen: Counter[str] = Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.update(getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend=backend, fullgraph=True)(image)
    assert (found - expected).abs().mean() <= 0.01 * expected.std()
    linears = [s for s in model.sites().values() if isinstance(s, QuantizedLinear)]
    assert sum(count for name, count in seen.items() if "contract" in name) == len(linears)
    assert sum(count for name, count in seen.items() if "blocked_attention" in name) > 0


def test_bounds_per_token_stay_one_operator(without_code: None) -> None:
    config = HarmoqConfig(4, 4, rules=[SiteRule("*", dynamic=True)])
    model, image = converted("linears", config), images(1)[0]
    expected = model(image)
    with for_compiler():
        shown = _calls(fixed_size(model, image).graph)
    assert shown["harmoq.linear.default"] > 0
    assert shown["harmoq.contract.default"] == 0
    assert torch.equal(compile_model(model)(image), expected)


def test_a_reference_that_was_asked_for_stays(without_code: None) -> None:
    model, image = converted("SwinIR/light", HarmoqConfig(4, 4)), images(1)[0]
    model.use_reference()
    with for_compiler():
        assert _calls(fixed_size(model, image).graph)["harmoq.contract.default"] == 0


def test_operators_pass_torchs_own_checks() -> None:
    model = converted("SwinIR/light", HarmoqConfig(4, 4))
    site = next(s for s in model.sites().values() if isinstance(s, QuantizedLinear))
    codes = torch.randint(0, 16, (5, site.columns), dtype=torch.uint8)
    torch.library.opcheck(ops.contract, (codes, *site._tensors(), *site._numbers(), torch.float32))
    q, k, v = (torch.randn(3, 2, *s).bfloat16() for s in ((4, 5), (5, 4), (4, 5)))
    torch.library.opcheck(blocked_attention, (q, k, v, [torch.randn(2, 4, 4).bfloat16()]))


def test_attention_is_the_same_by_the_operator() -> None:
    q, k, v = (torch.randn(7, 2, *s).bfloat16() for s in ((16, 5), (5, 16), (16, 5)))
    terms = [torch.randn(7, 1, 16, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()]
    with for_compiler():
        found = fused_attention(q, k, v, *terms)
    assert torch.equal(found, fused_attention(q, k, v, *terms))


@pytest.mark.slow
@needs_compiler
def test_compiled_code_computes_the_same() -> None:
    model = converted("SwinIR/light", HarmoqConfig(8, 8))
    first, second = images(2, (16, 16))
    fast = compile_model(model)
    for image in (first, second):
        expected = model(image)
        assert (fast(image) - expected).abs().mean() <= 1e-3 * expected.std()


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path) -> None:
    program = """
        from harmoq_ao.config import HarmoqConfig
        from harmoq_ao.common.errors import CompilerError
        from harmoq_ao.runtime.compiled import compile_model
        from tests.models import converted, images

        try:
            compile_model(converted("linears", HarmoqConfig(8, 8)))(images(1)[0])
        except CompilerError as error:
            print(error)
    """
    printed = run_without_compiler(program, tmp_path)
    assert all(part in printed for part in ("C++ compiler", "no-compiler", "install one"))


def test_images_that_do_not_fit_are_refused(without_code: None) -> None:
    fast = compile_model(converted("linears", HarmoqConfig(8, 8)))
    with pytest.raises(InputError, match="channels"):
        fast(torch.rand(1, 1, 16, 16))
    with pytest.raises(InputError, match="finite"):
        fast(torch.full((1, 3, 16, 16), float("nan")))
    assert not fast._programs


def test_tiles_of_different_images_are_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose strides differ, on which torch.compile insists."""
    graphs: list[torch.fx.GraphModule] = []
    real = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, **{**options, "backend": backend}))
    fast = compile_model(converted("linears", HarmoqConfig(8, 8)))
    for side in (16, 20, 24):
        fast(torch.rand(1, 3, side, side)[..., :16, :16])
    assert len(graphs) == 1


def test_few_sizes_are_kept(without_code: None) -> None:
    fast = compile_model(converted("linears", HarmoqConfig(8, 8)), keep=2)
    for side in (8, 12, 8, 16):
        fast(torch.rand(1, 3, side, side))
    assert [key[0][-1] for key in fast._programs] == [8, 16]  # type: ignore[index]
    with pytest.raises(ConfigError, match="keep=0"):
        compile_model(converted("linears", HarmoqConfig(8, 8)), keep=0)
