"""The CPU's chain of two linears against the two by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from harmoq_ao.common.errors import InputError, KernelError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.kernels import onednn, onednn_mlp
from harmoq_ao.sites.quantized import QuantizedLinear
from tests.kernels.test_onednn import SEEDS, make_operands
from tests.models import converted, images


@given(
    seed=SEEDS,
    rows=st.integers(0, 40),
    channels=st.integers(1, 40),
    hidden=st.integers(1, 80),
    bits=st.integers(2, 8),
    gelu=st.sampled_from(["none", "tanh"]),
    block=st.sampled_from([1, 7, 1000]),
    integers=st.booleans(),
)
def test_equals_the_two_linears(
    seed: int, rows: int, channels: int, hidden: int, bits: int, gelu: str, block: int, integers: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not integers:
            patch.setattr(onednn, "is_available", lambda: False)
        first, second = (
            onednn.pack_linear(
                make_operands(seed, *shape, bits=bits, act_bits=bits, shift=0.5 if bits < 8 else 0.0, joint=True)
            )
            for shape in ((channels, hidden), (hidden, channels))
        )
        x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)).t().contiguous().t()
        patch.setattr(onednn_mlp, "block_rows", lambda *_: block)
        found = onednn_mlp.mlp(x, first, second, gelu)
    assert onednn_mlp.takes(first, second)
    assert torch.equal(found, onednn.linear(F.gelu(onednn.linear(x, first), approximate=gelu), second))


def test_what_it_does_not_take() -> None:
    static, dynamic = make_operands(1, 8, 8, shift=0.0), make_operands(1, 8, 8, shift=0.0, dynamic=True)
    shifted = make_operands(1, 8, 8, shift=0.3)
    packed = [onednn.pack_linear(operands) for operands in (static, dynamic, shifted)]
    assert [onednn_mlp.takes(packed[0], other) for other in packed] == [True, False, False]
    with pytest.raises(InputError, match="not a number"):
        onednn_mlp.mlp(torch.full((2, 8), torch.nan), packed[0], packed[0], "none")
    with pytest.raises(KernelError):
        onednn_mlp.mlp(torch.zeros(2, 9), packed[0], packed[0], "none")


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_model_runs_its_mlps_in_chains_unless_someone_listens(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    model = converted("SwinIR/light", HarmoqConfig(4, 4, rules=[SiteRule(kind="linear", dynamic=dynamic)]))
    calls, heard, chain = [], [], onednn_mlp.mlp

    def counted(*operands: Any) -> torch.Tensor:
        calls.append(1)
        return chain(*operands)

    monkeypatch.setattr(onednn_mlp, "mlp", counted)
    image = images(1)[0]
    found = model(image)
    assert len(calls) == (0 if dynamic else 4)
    for site in model.sites().values():
        if isinstance(site, QuantizedLinear):
            site.register_forward_hook(lambda *_: heard.append(1))
    calls.clear()
    assert torch.equal(model(image), found)
    assert len(heard) == len(model.sites())
    assert not calls
