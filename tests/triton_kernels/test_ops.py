"""The operators: eager, under torch.compile without graph breaks, and exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmoq_ao.triton_kernels import attention, lowbit_linear, mlp, ops, window_attention
from harmoq_ao.triton_kernels.operands import Norm
from tests.triton_kernels.helpers import random_attention, random_linear, regions, seeded

G = seeded(7)
_, FC1 = random_linear(G, 24, 20, 4, 8)
_, FC2 = random_linear(G, 20, 24, 3, 8)
_, TOKEN = random_linear(G, 24, 20, 4, 8, static=False)
ATTENTION = random_attention(G, 16, 20, 2, 4)
PAPER = random_attention(G, 16, 20, 2, 4, paper=True, scale_after=True)
CORE = replace(PAPER, qkv=None, qkv_heads=None, proj=None, proj_heads=None)
X, WINDOWS, IDS = torch.randn(9, 20), torch.randn(4, 16, 20), regions(G, 2, 16)
LINEAR, WHOLE = ops.flatten_linear(FC1), ops.flatten_attention(PAPER)
AFTER = Norm(torch.ones(20), torch.zeros(20), 1e-5)
INDEX = torch.randperm(16, generator=G, dtype=torch.int32).view(1, 16)


Calls = tuple[Callable[[Tensor], Any], Callable[[Tensor], Any], Tensor]


def _heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = x.unflatten(-1, (2, 10))
    return q, q * 0.5, q - 1


CASES: dict[str, Calls] = {
    "mlp": (
        lambda x: ops.mlp(x, FC1, FC2, eps=1e-5, after=AFTER, residual=x),
        lambda x: mlp.reference(x, FC1, FC2, eps=1e-5, after=AFTER, residual=x),
        X,
    ),
    "linear": (
        lambda x: ops.linear(x, FC1, gate=x, eps=1e-5, gelu="erf", out_dtype=torch.bfloat16),
        lambda x: lowbit_linear.reference(x, FC1, gate=x, eps=1e-5, gelu="erf", out_dtype=torch.bfloat16),
        X,
    ),
    "window_attention": (
        lambda x: ops.window_attention(x, ATTENTION, regions=IDS, after=AFTER, residual=x),
        lambda x: window_attention.reference(x, ATTENTION, regions=IDS, after=AFTER, residual=x),
        WINDOWS,
    ),
    "window_attention paper": (
        lambda x: ops.window_attention(x, PAPER, index=INDEX),
        lambda x: window_attention.reference(x, PAPER, index=INDEX),
        WINDOWS,
    ),
    "attention": (
        lambda x: ops.attention(*_heads(x), CORE, regions=IDS),
        lambda x: attention.reference(*_heads(x), CORE, regions=IDS),
        WINDOWS,
    ),
}


def same(left: Any, right: Any) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("name", CASES)
def test_eager_and_compiled_are_the_reference(name: str) -> None:
    op, reference, x = CASES[name]
    expected = reference(x)
    assert same(op(x), expected)
    torch._dynamo.reset()
    assert same(torch.compile(op, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_exported_is_the_reference(name: str) -> None:
    op, reference, x = CASES[name]

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return op(x)

    program = torch.export.export(Module(), (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    bigger = torch.cat([x, x])
    assert same(program.module()(bigger), reference(bigger))


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (
            ops._fused_mlp,
            (X, *ops.flatten_linear(FC1), *ops.flatten_linear(FC2), "erf", None, *ops.flatten_norm(AFTER), X),
        ),
        (ops._fused_linear, (X, *ops.flatten_linear(FC1), X, 1e-5, "erf", None, torch.float32)),
        (ops._attention_core, (*_heads(WINDOWS), *ops.flatten_attention(CORE), None, None, IDS, IDS, None)),
        (
            ops._window_attention,
            (WINDOWS, *ops.flatten_attention(PAPER), None, IDS, None, *ops.flatten_norm(None), None, None),
        ),
    ],
)
def test_operators_keep_the_rules_of_torch(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operands_survive_flattening() -> None:
    assert ops.restore_attention(*ops.flatten_attention(CORE)).proj is None
    for operands in (ATTENTION, PAPER):
        again = ops.restore_attention(*ops.flatten_attention(operands))
        assert vars(again).keys() == vars(operands).keys()
        assert (again.heads, again.scores, again.left_bits) == (operands.heads, operands.scores, operands.left_bits)
        assert torch.equal(again.proj_heads.codes, operands.proj_heads.codes)
    assert ops.restore_linear(*ops.flatten_linear(TOKEN)).total is TOKEN.total
