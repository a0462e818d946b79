"""Float checkpoints: the architecture's own keys, loaded by spandrel, and the outputs of quantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spandrel import ModelLoader
from torch import nn

from harmoq_ao.calibration.solve import enable_fake_quant
from harmoq_ao.common.errors import ExportError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.convert import convert_harmoq
from harmoq_ao.export.checkpoint import checkpoint_state, export_checkpoint
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedLinear
from tests.models import build, calibrated, converted, images


def shifted(name: str, config: HarmoqConfig) -> PreparedModel:
    """A calibrated model with joint scales, and shifts where there is a bias, that are not trivial; norms moved."""
    prepared = calibrated(name, config)
    generator = torch.Generator().manual_seed(3)
    for site in prepared.sites():
        if isinstance(site, PreparedLinear) and site.quantizers():
            length = site.weight.shape[1]
            if site.joint_scale is not None:
                site.set_joint_scale(site.joint_scale * (0.8 + 0.4 * torch.rand(length, generator=generator)))
            if site.bias is not None and config.act_bits < 8:
                site.set_joint_shift(0.1 * torch.randn(length, generator=generator))
    with torch.no_grad():
        for module in prepared.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(1.01)
    return prepared


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("SwinIR/light", HarmoqConfig(8, 8, storage_dtype="float32")),
        ("SwinIR/light", HarmoqConfig(4, 4, conv_bits=8, storage_dtype="float32")),
        ("DAT", HarmoqConfig(4, 4, storage_dtype="float32")),
    ],
    ids=["SwinIR W8A8", "SwinIR W4A4", "DAT W4A4"],
)
def test_spandrel_loads_what_computes_with_quantized_weights(tmp_path: Path, name: str, config: HarmoqConfig) -> None:
    prepared = shifted(name, config)
    quantized = convert_harmoq(prepared)
    state = export_checkpoint(quantized, tmp_path / "m.safetensors")
    original = build(name).state_dict()
    assert set(state.tensors) == set(original)
    assert all(state.tensors[key].shape == tensor.shape for key, tensor in original.items())
    assert state.without_bias == []
    loaded = ModelLoader().load_from_file(tmp_path / "m.safetensors").model.eval()
    assert type(loaded) is type(build(name))

    enable_fake_quant(prepared)
    for site in prepared.sites():
        if site.act_quantizer is not None:
            site.act_quantizer.disable_fake_quant()
        if site.site.kind == "matmul" and site.weight_quantizer is not None:
            site.weight_quantizer.disable_fake_quant()
    image = images(1, seed=7)[0]
    with torch.no_grad():
        found, expected, float_output = loaded(image), prepared(image), build(name)(image)
    moved = (float_output - expected).abs().mean()
    assert (found - expected).abs().mean() < 0.01 * moved
    assert moved > 0


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="spandrel"):
        checkpoint_state(converted("linears", HarmoqConfig(8, 8)))
    with pytest.raises(ExportError, match="convert_harmoq"):
        export_checkpoint(torch.nn.Identity(), tmp_path / "m.safetensors")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
