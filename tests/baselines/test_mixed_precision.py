"""Mixed-precision bit allocation on small models: an allowed loss, a size on disk, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from harmoq_ao import HarmoqConfig, SiteRule, calibrate, convert_harmoq, prepare_harmoq
from harmoq_ao.baselines.mixed_precision import Mixture, mix_bits
from harmoq_ao.baselines.sensitivity import Measured
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.conversion.load import load_quantized
from harmoq_ao.conversion.save import folder_bytes, save_quantized
from harmoq_ao.images import luma
from tests.models import build, images


def pairs(model: nn.Module, count: int = 2) -> list[Measured]:
    """References that float misses by a little, as photographs are missed."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for image in images(count, seed=11):
        with torch.no_grad():
            output: Tensor = model(image)[0].clamp(0, 1)
        found.append(Measured(image[0], output + 0.0004 * torch.randn(output.shape, generator=generator)))
    return found


def mixed(config: HarmoqConfig | None = None, **aim: float | int) -> Mixture:
    model = build("SwinIR/light")
    crops = [image[0] for image in images(3)]
    return mix_bits(model, crops, pairs(model), config or HarmoqConfig(), **aim)  # type: ignore[arg-type]


def measured_drop(config: HarmoqConfig) -> float:
    """The loss of a model quantized in the ordinary way, measured apart."""
    model = build("SwinIR/light")
    prepared = calibrate(prepare_harmoq(model, config), images(3))
    losses = []
    with torch.no_grad():
        for pair in pairs(model):
            border = prepared.traits.scale
            cut = slice(border, -border)
            reference = luma(pair.reference)[:, cut, cut].double()
            errors = [
                ((luma(run(pair.image[None])[0].clamp(0, 1))[:, cut, cut].double() - reference) ** 2).mean()
                for run in (prepared, model)
            ]
            losses.append(10 * torch.log10(errors[0] / errors[1]))
    return float(torch.stack(losses).mean())


def test_a_loss_is_kept_to_with_fewer_bits() -> None:
    found = mixed(max_drop=0.3)
    assert found.drop_db <= 0.3
    assert found.total_bits < found.uniform_bits
    assert len(set(found.bits.values())) > 1
    config = HarmoqConfig(rules=found.rules())
    assert measured_drop(config) == pytest.approx(found.drop_db, abs=1e-3)  # images one by one, not as a batch
    assert f"{found.total_bits:,}" in found.describe()


def test_the_choice_is_saved_with_the_model_and_reported(tmp_path: Path) -> None:
    found = mixed(max_drop=0.3)
    config = HarmoqConfig(rules=found.rules())
    prepared = calibrate(prepare_harmoq(build("SwinIR/light"), config), images(3))
    prepared.history = found.recorded(prepared.history)
    loaded = load_quantized(save_quantized(convert_harmoq(prepared), tmp_path / "mixed"))
    assert loaded.history is not None
    assert loaded.history.choice == found.describe()
    costs = {row.name: row.sensitivity_db for row in loaded.report().rows}
    for site in found.sites:
        assert costs[site.name] == pytest.approx(site.sensitivity_db[found.bits[site.name]], rel=0.01, abs=1e-12)
    assert loaded.config.widths in ("W2..8A8", "W3..8A8")


def test_a_larger_loss_takes_no_more_bits() -> None:
    small, large = mixed(max_drop=0.2), mixed(max_drop=2.0)
    assert large.total_bits < small.total_bits


def test_a_size_is_kept_to_on_disk(tmp_path: Path) -> None:
    model = build("SwinIR/light")
    uniform = convert_harmoq(calibrate(prepare_harmoq(model, HarmoqConfig()), images(3)))
    before = folder_bytes(save_quantized(uniform, tmp_path / "uniform"))
    target = before - 2000
    found = mixed(max_bytes=target)
    config = HarmoqConfig(rules=found.rules())
    converted = convert_harmoq(calibrate(prepare_harmoq(model, config), images(3)))
    assert target - 2000 < folder_bytes(save_quantized(converted, tmp_path / "mixed")) <= target


def test_sites_with_a_rule_keep_it() -> None:
    names = [s.site.name for s in prepare_harmoq(build("SwinIR/light")).sites() if s.site.kind == "linear"]
    found = mixed(HarmoqConfig(rules=(SiteRule(names[0], weight_bits=6),)), max_drop=0.5)
    assert names[0] not in found.bits
    assert set(found.bits) <= set(names[1:])


@pytest.mark.parametrize(
    ("aim", "match"),
    [
        ({}, "Exactly one"),
        ({"max_drop": 0.1, "max_bytes": 10}, "Exactly one"),
        ({"max_drop": -1.0}, "out of range"),
        ({"max_drop": float("nan")}, "out of range"),
        ({"max_drop": 1e-9}, "less than what the model loses"),
        ({"max_bytes": 10}, "does not fit"),
        ({"max_drop": 0.1, "widths": (8,)}, "no widths"),
    ],
)
def test_aims_that_cannot_be_are_refused(aim: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        mixed(**aim)


def test_without_images_to_measure_on_nothing_is_chosen() -> None:
    with pytest.raises(CalibrationError, match="no images to measure"):
        mix_bits(build("SwinIR/light"), [images(1)[0][0]], [], HarmoqConfig(), max_drop=0.1)
