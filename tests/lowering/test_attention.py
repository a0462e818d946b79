"""Float attention of converted islands in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.graph import is_island, island_state
from harmoq_ao.lowering import attention
from harmoq_ao.lowering.attention import fused_attention
from harmoq_ao.lowering.attention_matching import score_stand_in, widened
from tests.lowering.helpers import Network


class Attention(nn.Module):
    """Window attention in the usual words; the flags are what authors vary."""

    def __init__(self, bias: bool = True, module_softmax: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(1, 2, 16, 16)) if bias else None
        self.drop = nn.Dropout(0.1)
        self.softmax = nn.Softmax(dim=-1) if module_softmax else None
        self.masked = masked
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        attention = q * 0.5 @ k.transpose(-2, -1)
        if self.bias is not None:
            attention = attention + self.bias
        if self.masked:
            mask = torch.where(x[..., :1] > 0, 0.0, -2.0).transpose(1, 2).expand(b, n, n)  # another for each window
            attention = attention.view(1, b, attention.shape[1], n, n) + mask.unsqueeze(1).unsqueeze(0)
            attention = attention.view(-1, 2, n, n)
        attention = attention.softmax(-1) if self.softmax is None else self.softmax(attention)
        attention = self.drop(attention)
        return (attention @ v).transpose(1, 2).reshape(b, n, c)


def converted(attention: nn.Module, **config: object) -> tuple[h.PreparedModel, h.QuantizedModel]:
    torch.manual_seed(0)
    model = Network(attention).eval()
    images = [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 12, 8)]
    settings = h.HarmoqConfig(8, 8, **config)  # type: ignore[arg-type]
    prepared = h.prepare_harmoq(model, settings, images, strict=True)
    h.calibrate(prepared, images)
    return prepared, h.convert_harmoq(prepared)


def sources(model: nn.Module) -> str:
    islands = [m for m in model.modules() if is_island(m)]
    return "".join(v.graph.python_code("self").src for m in islands for v in island_state(m).all_variants())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("module_softmax", [True, False])
def test_one_call_and_the_same_result(bias: bool, masked: bool, module_softmax: bool) -> None:
    prepared, quantized = converted(Attention(bias=bias, masked=masked, module_softmax=module_softmax))
    assert "fused_attention" in sources(quantized.model)
    for image in (torch.rand(1, 3, 8, 8), torch.rand(3, 3, 16, 12)):
        with torch.no_grad():
            torch.testing.assert_close(quantized(image), prepared(image), atol=2e-2, rtol=1e-2)


def test_quantized_products_are_left_alone() -> None:
    _, quantized = converted(Attention(), profile="paper")
    assert "fused_attention" not in sources(quantized.model)


class KeepsTheMap(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = k = self.qkv(x)[..., :8]
        attention = (q @ k.transpose(-2, -1)).softmax(-1)
        return attention @ x + attention.mean()


class OtherAxis(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.qkv(x)[..., :8]
        return (q @ q.transpose(-2, -1)).softmax(-2) @ x


@pytest.mark.parametrize("cls", [KeepsTheMap, OtherAxis])
def test_what_does_not_match_in_full_is_left_alone(cls: type[Attention]) -> None:
    prepared, quantized = converted(cls())
    assert "fused_attention" not in sources(quantized.model)
    image = torch.rand(1, 3, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(quantized(image), prepared(image), atol=2e-2, rtol=1e-2)  # a step apart on a tie


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 5, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_against_float64(shape: tuple[int, ...], biased: bool) -> None:
    q, k, v = (torch.randn(shape) for _ in range(3))
    bias = torch.randn(5, 5) if biased else None
    scores = q.double() @ k.double().transpose(-2, -1) + (0.0 if bias is None else bias.double())
    expected = torch.softmax(scores, -1) @ v.double()
    found = fused_attention(q, k.transpose(-2, -1), v, *(() if bias is None else (bias,)))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_stand_in_has_the_shape_of_the_scores_and_no_memory() -> None:
    zeros = score_stand_in(torch.rand(4, 2, 16, 3), torch.rand(1, 2, 3, 9))
    assert zeros.shape == (4, 2, 16, 9)
    assert zeros.untyped_storage().nbytes() == 4


def test_widening_takes_no_memory_where_the_type_is_the_same() -> None:
    term, like = torch.rand(2, 1, 9), torch.zeros(()).expand(4, 2, 16, 9)
    wide = widened(term, like)
    assert wide.data_ptr() == term.data_ptr()
    torch.testing.assert_close(wide, term.expand(4, 2, 16, 9))
    assert widened(term, like.bfloat16()).dtype is torch.bfloat16
    assert widened(like, torch.rand(3, 4, 2, 16, 9)).shape == (3, 4, 2, 16, 9)


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("windows", [1, 7])
def test_blocks_of_bfloat16_against_float64(monkeypatch: pytest.MonkeyPatch, block: int, windows: int) -> None:
    monkeypatch.setattr(attention, "_BLOCK_BYTES", block)
    q, k, v = (torch.randn(windows, 3, n, 10).bfloat16() for n in (20, 30, 30))
    bias, mask = torch.randn(3, 20, 30), torch.where(torch.rand(windows, 1, 20, 30) < 0.3, -100.0, 0.0)
    scores = 0.3 * q.double() @ k.double().transpose(-2, -1) + bias.double() + mask.double()
    found = fused_attention(0.3 * q, k.transpose(-2, -1), v, bias, mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), torch.softmax(scores, -1) @ v.double(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("width", [8, 10, 13])
def test_heads_are_padded_to_whole_vectors(width: int) -> None:
    query, key, value = torch.randn(2, 3, 5, width), torch.randn(2, 3, width, 7), torch.randn(2, 3, 7, width)
    padded = attention.whole_vectors(query, key, value)
    assert [part.shape[axis] % 8 for part, axis in zip(padded, (-1, -2, -1), strict=True)] == [0, 0, 0]
    found = fused_attention(*padded)[..., :width]
    torch.testing.assert_close(found, fused_attention(query, key, value))
