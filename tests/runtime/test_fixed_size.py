"""Models for one image size: the same numbers, constants computed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harmoq_ao.common.errors import InputError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.gpu_programs.kernels import Mlp, WindowAttention
from harmoq_ao.runtime.fixed_size import fixed_size, fold_constants
from tests.models import converted, images


@pytest.mark.parametrize(
    "name", ["SwinIR/light", *(pytest.param(name, marks=pytest.mark.slow) for name in ("DAT", "HAT"))]
)
@pytest.mark.parametrize(
    ("size", "dtype"), [((16, 16), torch.float32), ((16, 24), torch.bfloat16), ((19, 13), torch.float32)]
)
def test_computes_the_same(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    model = converted(name, HarmoqConfig(8, 8), dtype)
    first, second = images(2, size)
    fixed = fixed_size(model, first)
    for image in (first, second):
        found, expected = fixed(image), model(image)
        if dtype == torch.float32:
            assert torch.equal(found, expected)
        else:  # float attention in bfloat16 runs in blocks where it is not compiled: scores are rounded once more
            assert (found - expected).abs().mean() <= 0.01 * expected.std()


def test_masks_are_constants() -> None:
    model, image = converted("SwinIR/light", HarmoqConfig(8, 8)), images(1, (16, 24))[0]
    fixed = fixed_size(model, image)
    names = [str(node.target) for node in fixed.graph.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "masked_fill" in name or "masked" in name or "arange" in name]
    assert any("harmoq.linear" in name for name in names)


def test_masks_that_are_widened_before_they_are_used_are_constants_too() -> None:
    """The wide form is too large to keep; what it is made from is kept, and its drawing is gone."""

    class Masked(nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(8, 8)
            mask[:4] = -100.0
            return scores + (mask - mask.T).unsqueeze(0).expand(16, 8, 8)

    scores = torch.rand(16, 8, 8)
    module = torch.export.export(Masked(), (scores,)).run_decompositions({}).module(check_guards=False)
    fold_constants(module)
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "full" in name or "zeros" in name or "sub" in name or "scatter" in name]
    assert [name for name in names if "expand" in name]
    assert torch.equal(module(scores), Masked()(scores))


@pytest.mark.parametrize(("growth", "adds"), [(None, 1), (1.0, 2)])
def test_what_grows_stays_in_the_graph_where_that_is_asked_for(growth: float | None, adds: int) -> None:
    """A mask per window plus a bias per head takes more memory than both."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.rand(8, 1, 4, 4))
            self.register_buffer("bias", torch.rand(1, 4, 4, 4))

        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            batch = self.mask.unsqueeze(0).expand(2, 8, 1, 4, 4).reshape(16, 1, 4, 4)
            return scores + (self.bias + batch)

    scores, attention = torch.rand(16, 4, 4, 4), Attention()
    expected = attention(scores)
    module = torch.export.export(attention, (scores,)).run_decompositions({}).module(check_guards=False)
    fold_constants(module, growth=growth)
    assert sum("add" in str(node.target) for node in module.graph.nodes if node.op == "call_function") == adds
    assert torch.equal(module(scores), expected)


def test_fused_kernels_are_the_graph() -> None:
    """On a GPU, or where Triton is asked for; here the operators run their references."""
    model, image = converted("SwinIR/light", HarmoqConfig(4, 4)), images(1, (16, 24))[0]
    expected = model(image)
    model.use_backend("triton")
    fixed = fixed_size(model, image)
    kinds = [type(module) for module in fixed.graph.children()]
    assert (kinds.count(WindowAttention), kinds.count(Mlp)) == (4, 4)
    torch.testing.assert_close(fixed(image), expected, rtol=0, atol=1e-3)


def test_other_images_are_refused() -> None:
    fixed = fixed_size(converted("linears", HarmoqConfig(8, 8)), images(1)[0])
    for image in (images(1, (16, 24))[0], images(1)[0].double(), torch.rand(2, 3, 16, 16)):
        with pytest.raises(InputError, match="one size"):
            fixed(image)


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(InputError, match="GPU"):
        fixed_size(converted("linears", HarmoqConfig(8, 8)), images(1)[0], cuda_graph=True)


def test_random_numbers_and_images_are_not_constants() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.exp().sum() + torch.rand(4)

    module = torch.export.export(Noisy(), (torch.rand(4),)).module(check_guards=False)
    fold_constants(module)
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "exp" in name or "sum" in name]
    assert [name for name in names if "rand" in name]
    assert not torch.equal(module(torch.zeros(4)), module(torch.zeros(4)))
