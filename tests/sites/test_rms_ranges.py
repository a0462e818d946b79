"""Ranges of queries and keys that are normalized over the image: the same codes for images of every size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.cpu_kernels import library
from harmoq_ao.programs.channel_attention import ChannelMaps
from harmoq_ao.programs.program import make_program
from harmoq_ao.sites import PreparedMatmul, QuantizedMatmul
from harmoq_ao.sites.forms import MatmulForm
from harmoq_ao.sites.site import Site
from tests.models import build, converted, images, run

CONFIG = HarmoqConfig(4, 4, "paper", storage_dtype="float32")


def _concerned(model: h.PreparedModel | QuantizedModel) -> list[str]:
    sites = model.sites().values() if isinstance(model, QuantizedModel) else model.sites()
    return [s.site.name for s in sites if isinstance(s, (PreparedMatmul, QuantizedMatmul)) and s.form.to_rms]


def _product(bits: int, bound: float, rms_ranges: bool = True) -> PreparedMatmul:
    """Scores whose operands are quantized to one range."""
    site = Site("a::matmul_0", "a.harmoq_matmul_0", "matmul", (0,), "query-key", unit_length=True)
    product = PreparedMatmul(site, MatmulForm("matmul"))
    product.attach_quantizers(HarmoqConfig(bits, bits, "paper", rms_ranges=rms_ranges), torch.device("cpu"))
    for quantizer in product.quantizers():
        quantizer.set_bounds(-bound, bound)
        quantizer.disable_observer()
        quantizer.enable_fake_quant()
    return product


@given(st.integers(2, 8), st.integers(1, 60), st.integers(1, 3), st.floats(0.5, 4), st.integers(0, 2**31))
def test_an_image_that_repeats_has_the_same_scores(
    bits: int, pixels: int, doublings: int, bound: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(2, 5, pixels, generator=generator), dim=-1) for _ in range(2))
    times = 4**doublings  # lengths then change by powers of two, without rounding
    wide_q, wide_k = (x.repeat(1, 1, times) / 2**doublings for x in (q, k))
    product = _product(bits, bound)
    torch.testing.assert_close(product(wide_q, wide_k.mT), product(q, k.mT), rtol=1e-5, atol=1e-6)


def test_ranges_of_the_entries_themselves_do_not_fit_a_larger_image() -> None:
    q, k = (F.normalize(torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(s)), dim=-1) for s in range(2))
    product = _product(3, 0.3, rms_ranges=False)
    wide_q, wide_k = (x.repeat(1, 1, 16) / 4 for x in (q, k))
    assert (product(wide_q, wide_k.mT) - product(q, k.mT)).abs().max() > 0.05


def test_only_operands_normalized_over_the_image_are_concerned() -> None:
    prepared = h.prepare_harmoq(build("DAT/light"), CONFIG)
    (name,) = _concerned(prepared)
    site = next(s for s in prepared.sites() if s.site.name == name)
    assert (site.site.shape, site.site.role) == ((0,), "query-key")
    assert len(_concerned(h.prepare_harmoq(build("channels"), CONFIG))) == 1
    for other in ("SwinIR/light", "Swin2SR", "forms", "long"):  # cosines of windows among them
        assert not _concerned(h.prepare_harmoq(build(other), CONFIG))
    per_token = replace(CONFIG, rules=(SiteRule("*", kind="matmul", dynamic=True),))
    for config in (per_token, replace(CONFIG, rms_ranges=False), replace(CONFIG, profile="deploy")):
        assert not _concerned(h.prepare_harmoq(build("channels"), config))


@pytest.mark.parametrize("name", ["channels", "DAT/light"])
def test_it_survives_saving(tmp_path: Path, name: str) -> None:
    quantized, image = converted(name, CONFIG), images(1)[0]
    h.save_quantized(quantized, tmp_path / "model")
    loaded = h.load_quantized(tmp_path / "model", build(name))
    assert loaded.config.rms_ranges
    assert len(_concerned(loaded)) == 1
    assert torch.equal(loaded(image), quantized(image))


@torch.no_grad()
def _error(quantized: QuantizedModel, size: tuple[int, int]) -> Tensor:
    image = images(1, size, seed=5)[0]
    return (quantized(image) - build("channels")(image)).square().mean()


def test_errors_do_not_grow_with_the_image() -> None:
    """Calibrated at 16 x 16; without it all codes of an image of 16 times the pixels are those next to zero."""
    own, plain = (converted("channels", replace(CONFIG, rms_ranges=on)) for on in (True, False))
    assert _error(own, (64, 64)) < 2 * _error(own, (16, 16))
    assert _error(own, (64, 64)) < _error(plain, (64, 64))


@pytest.mark.skipif(not library.status().available, reason="the C++ kernels cannot be built here")
def test_its_kernel_is_that_of_channel_attention() -> None:
    quantized = converted("DAT/light", CONFIG)
    image = images(1, (24, 16), seed=5)[0]
    quantized.use_reference()
    want = run(quantized, image)
    quantized.use_backend("auto")
    program = make_program(quantized.model, image, half=False)
    assert sum(isinstance(module, ChannelMaps) for module in program.children()) == 1
    spread = float(want.max() - want.min())
    assert float((program(image) - want).abs().mean()) < 1e-3 * spread


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="rms_ranges"):
        HarmoqConfig(rms_ranges="yes")  # type: ignore[arg-type]
    assert not HarmoqConfig.from_dict({"weight_bits": 4}).rms_ranges
