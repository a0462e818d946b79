"""Pictures, distributions, sizes and charts of a report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.save import float_bytes, folder_bytes, save_quantized
from harmoq_ao.images.metrics import bicubic_upscale, psnr_y
from harmoq_ao.reporting import Scene, pictures
from harmoq_ao.reporting.charts import xy_chart
from harmoq_ao.reporting.distributions import recorded, worst_sites
from harmoq_ao.reporting.pictures import compare, heat_ceiling
from harmoq_ao.reporting.sizes import float32_bytes, size_rows
from tests.models import PER_TOKEN, build, converted, images
from tests.reporting.conftest import HOSTILE, PAPER, source


def test_without_a_float_model_the_other_picture_is_bicubic(scene: Scene) -> None:
    image = source(high=False)
    shown = compare(image, scene.quantized, None)
    bicubic = bicubic_upscale(image.low.to_uint8(), 2)
    assert np.array_equal(shown.reference, bicubic)
    assert shown.agreement == pytest.approx(psnr_y(shown.quantized, bicubic, 0))
    rounded = np.abs(shown.quantized.astype(float) - bicubic).mean(2)
    assert np.abs(shown.error - rounded).max() <= 1.0  # half a level each
    assert shown.scores == {}


def test_a_large_picture_is_cut_to_where_it_differs_most(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(source(), scene.quantized, scene.reference)
    monkeypatch.setattr(pictures, "MAX_SIDE", 30)
    part = compare(source(), scene.quantized, scene.reference)
    assert whole.window.whole
    assert not part.window.whole
    assert part.quantized.shape == part.reference.shape == (30, 30, 3)
    assert np.array_equal(part.quantized, part.window.cut(whole.quantized))
    assert part.scores == whole.scores
    assert part.max_error == whole.max_error


def test_all_maps_share_a_scale_that_holds_their_errors(scene: Scene) -> None:
    both = [compare(s, scene.quantized, scene.reference) for s in scene.sources]
    ceiling = heat_ceiling(both)
    assert all(np.mean(p.error > ceiling) <= 0.002 for p in both)
    assert heat_ceiling([replace(both[0], error=np.zeros((4, 4), np.float32))]) == 0.5


@pytest.mark.parametrize("rules", [(), PER_TOKEN])
def test_histograms_count_what_a_site_was_given(rules: Any) -> None:
    model = converted("forms", HarmoqConfig(4, 4, "paper", conv_bits=8, rules=rules))
    names = [row.name for row in model.report().quantized]
    with recorded(model, names) as found:
        model(images(1)[0])
    assert set(found) == set(names)
    bounds = {row.name: row.bounds for row in model.report().quantized}
    for name, histograms in found.items():
        kind = model.sites()[name].site.kind
        assert [h.operand for h in histograms] == (["left", "right"] if kind == "matmul" else ["input"])
        assert all(sum(h.counts) > 0 and 0 <= h.outside < 0.5 for h in histograms)
        first = histograms[0].quant_range
        assert first == (pytest.approx(bounds[name]) if isinstance(bounds[name], tuple) else None)
    assert not [m for m in model.modules() if m._forward_pre_hooks and m in model.sites().values()]


def test_histograms_are_of_the_quantizers_own_domain() -> None:
    model = converted("linears", HarmoqConfig(4, 4))
    name = next(n for n, s in model.sites().items() if s.joint_scale is not None)
    site: Any = model.sites()[name]
    kept: list[torch.Tensor] = []
    handle = site.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with recorded(model, [name]) as found:
        model(images(1)[0])
    handle.remove()
    shift = 0.0 if site.joint_shift is None else site.joint_shift
    expected = (kept[0] - shift) / site.joint_scale
    histogram = found[name][0]
    assert sum(histogram.counts) == expected.numel()
    assert histogram.low == pytest.approx(min(float(expected.min()), (histogram.quant_range or (0, 0))[0]))


def test_histograms_of_relative_maps_are_within_their_rows_range() -> None:
    model = converted("SwinIR/light", replace(PAPER, relative_maps=True))
    names = [name for name, site in model.sites().items() if getattr(site, "relative", False)]
    assert names
    with recorded(model, names) as found:
        model(images(1)[0])
    for left, _ in found.values():
        assert left.quant_range == pytest.approx((0, 1), abs=1e-3)
        assert left.low >= 0
        assert left.counts[-1] > 0  # every row has an entry of one


def test_the_worst_sites_come_lowest_first() -> None:
    rows = converted("SwinIR/light", PAPER).report().rows
    worst = worst_sites(rows, 5)
    levels = [row.sqnr_db for row in worst if row.sqnr_db is not None]
    assert levels == sorted(levels)
    assert levels == sorted(r.sqnr_db for r in rows if r.sqnr_db is not None)[:5]


def test_sizes_add_up_to_the_folder(tmp_path: Path) -> None:
    model = converted("SwinIR/light", PAPER)
    size = folder_bytes(save_quantized(model, tmp_path / "m"))
    rows = {row.kind: row for row in size_rows(model, size)}
    assert sum(row.stored for row in rows.values()) == size
    assert all(row.stored > 0 for row in rows.values())
    codes = rows["weight codes"]
    assert codes.float32 is not None
    assert 7 < codes.float32 / codes.stored <= 8  # 4 bits for 32, rows padded to whole bytes
    assert float32_bytes(model) == float_bytes(build("SwinIR/light"))


@pytest.mark.parametrize("log", ["", "xy"])
@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [1e-6, 1e3], [0.5, 0.52]])
def test_charts_place_every_point_inside(values: list[float], log: str) -> None:
    points, names = [(v, v) for v in values], [HOSTILE] * len(values)
    chart, again = (xy_chart(points, "x", HOSTILE, title=HOSTILE, log=log, names=names) for _ in range(2))
    assert chart == again
    assert "nan" not in chart
    assert "<script" not in chart
    assert "var(--grid)" in chart
    root = ElementTree.fromstring(chart)
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    dots = [dot for dot in root.iter("use") if dot.find("title") is not None]
    assert [dot.find("title").text for dot in dots] == names
    assert all(0 < float(dot.attrib["x"]) < width and 0 < float(dot.attrib["y"]) < height for dot in dots)


def test_infinite_agreement_is_written_as_such(scene: Scene) -> None:
    same = compare(source(), scene.quantized, scene.quantized)
    assert math.isinf(same.agreement)
    assert same.max_error == 0.0
