"""PAMS: one number per activation, and nothing else learned."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.baselines.base import activation_quantizers
from harmoq_ao.baselines.pams import lower_share, one_scale
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.observers import MinMaxObserver
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme
from tests.baselines.helpers import applied, float_operands, learned_tensors
from tests.models import images

PAPER = HarmoqConfig(3, 3, "paper")


@pytest.mark.parametrize("name", ["forms", "SwinIR/light"])
@pytest.mark.parametrize("steps", [0, 8])
def test_bounds_are_symmetric_or_one_sided_where_nothing_is_negative(name: str, steps: int) -> None:
    prepared = applied("pams", name, PAPER, steps=steps)
    kinds = set()
    for quantizer, values in float_operands(prepared, images(6)).values():
        signed = float(values.min()) < 0
        lo, hi = (float(bound) for bound in quantizer.bounds())
        assert lo == (-hi if signed else 0.0)
        kinds.add(signed)
        if steps == 0:
            assert hi == float(values.abs().max())
    assert kinds == {True, False}, "attention maps are one-sided"


@pytest.mark.parametrize("name", ["forms", "SwinIR/light"])
def test_only_alphas_are_learned_and_the_loss_falls(name: str) -> None:
    names, learned = learned_tensors("pams", name, PAPER)
    alphas = {id(bound) for q in activation_quantizers(learned) for bound in (q.lower, q.upper)}
    parameters = dict(learned.named_parameters())
    assert all(id(parameters[name]) in alphas for name in names)


def test_weights_are_rounded_at_the_largest_of_their_row() -> None:
    prepared = applied("pams", "linears", PAPER, steps=2)
    for site in prepared.sites():
        assert torch.equal(site.weight_quantizer.bounds()[1], site.weight.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("scheme", [Scheme.ASYMMETRIC, Scheme.INTEGER_ZERO_POINT])
@pytest.mark.parametrize("lowest", [-1.0, -0.1, 0.0])
def test_gradients_reach_alpha_alone(scheme: Scheme, lowest: float) -> None:
    quantizer = HarmoqFakeQuantize(QuantizerSpec(4, scheme))
    quantizer.observer = MinMaxObserver(quantizer.spec, track_channels=False)
    quantizer.observer(torch.tensor([lowest, 1.0]))
    quantizer.set_bounds(lowest, 1.0)
    share = lower_share(quantizer)
    assert share == (0.0 if lowest == 0.0 else 1.0 if scheme is Scheme.ASYMMETRIC else 7 / 8)
    with one_scale([quantizer]):
        quantizer.learn_bounds()
        assert not quantizer.lower.requires_grad
        lo, hi = quantizer.bounds()
        (2.0 * lo + 5.0 * hi).backward()
    assert quantizer.lower_ratio is None
    assert quantizer.lower.grad is None
    assert float(quantizer.upper.grad) == 5.0 - 2.0 * share
    assert float(lo.detach()) == pytest.approx(-share * float(hi.detach()), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_inputs_of_convolutions_keep_a_level_at_zero_and_are_not_clipped_at_first(bits: int) -> None:
    prepared = applied("pams", "forms", HarmoqConfig(bits, bits, "paper", conv_bits=bits))
    for label, (quantizer, values) in float_operands(prepared, images(6)).items():
        if quantizer.spec.scheme is not Scheme.INTEGER_ZERO_POINT:
            continue
        lo, hi = quantizer.bounds()
        step, lower = quantizer.calculate_qparams()
        assert float(lower / step) == pytest.approx(round(float(lower / step)), abs=1e-6)
        assert float(lo) <= float(values.min()) * 0.999, label
        assert float(hi) >= float(values.max()) * 0.999, label
