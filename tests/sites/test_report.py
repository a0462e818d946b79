"""Reports: one row per contraction, complete after calibration and kept by conversion."""

from __future__ import annotations

import json

import pytest

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.sites.report import Report, SiteRow
from harmoq_ao.sites.site import CONSTANT, FloatCause, FloatReason
from tests.models import PER_TOKEN, build, calibrated, converted, prepare

PAPER = HarmoqConfig(4, 6, "paper", conv_bits=8)
DEPLOY = HarmoqConfig(4, 4, rules=PER_TOKEN)


def test_rows_before_calibration_know_shapes_and_bits_alone() -> None:
    for row in prepare("SwinIR/light", PAPER).report().quantized:
        assert row.bounds is None
        assert row.sqnr_db is None
        assert row.kernel is None
        assert row.macs > 0


def test_every_contraction_has_one_row() -> None:
    model = build("SwinIR/light")
    linears = [n for n, m in model.named_modules() if type(m).__name__ == "Linear"]
    convs = [n for n, m in model.named_modules() if type(m).__name__ == "Conv2d"]
    names = [row.name for row in calibrated("SwinIR/light", PAPER).report().rows]
    assert len(names) == len(set(names)) == len(linears) + len(convs) + 2 * 4
    assert set(linears) | set(convs) <= set(names)


def test_rows_after_calibration_are_complete() -> None:
    prepared = calibrated("SwinIR/light", PAPER)
    weights = dict(build("SwinIR/light").named_parameters())
    for row in prepared.report().quantized:
        assert isinstance(row.bounds, tuple)
        assert row.bounds[0] < row.bounds[1]
        assert row.weight_bits == {"linear": 4, "matmul": 6, "conv2d": 8}[row.kind]
        assert row.act_bits == {"linear": 6, "matmul": 6, "conv2d": 8}[row.kind]
        if row.kind == "linear":
            assert row.shape == tuple(weights[f"{row.name}.weight"].shape)
            assert row.joint_scale is not None
            assert 0 < row.joint_scale[0] <= row.joint_scale[1]
        if row.kind != "conv2d":
            assert row.sqnr_db is not None
            assert 5 < row.sqnr_db < 80


def test_more_bits_have_less_noise() -> None:
    def decibels(bits: int) -> list[float]:
        rows = calibrated("SwinIR/light", HarmoqConfig(bits, bits, "paper", joint_shift=False)).report().quantized
        return [row.sqnr_db for row in rows if row.sqnr_db is not None]

    low, high = decibels(4), decibels(8)
    assert len(low) == len(high) > 0
    assert all(15 < b - a < 33 for a, b in zip(low, high, strict=True))  # four bits are 24 dB


def test_what_stays_float_says_why() -> None:
    report = calibrated("SwinIR/light", DEPLOY).report()
    for row in report.rows:
        assert row.quantized == (row.reason is None)
        assert row.quantized or row.kind in ("conv2d", "matmul")
    assert {row.bounds for row in report.quantized} == {"dynamic"}


def test_summary_figures_count_the_rows() -> None:
    report = converted("SwinIR/light", DEPLOY).report()
    assert len(report.quantized) == 16
    assert len(report.sites) == 24
    share = sum(r.macs for r in report.rows if r.kind == "linear") / sum(r.macs for r in report.rows)
    assert report.macs_share == pytest.approx(share)
    assert 0 < report.macs_share < 1
    assert converted("SwinIR/light", HarmoqConfig(4, 4, "paper", conv_bits=4)).report().macs_share == 1.0


def test_constants_are_no_sites() -> None:
    rows = [
        SiteRow("a", "linear"),
        SiteRow("b", "linear", reason=CONSTANT),
        SiteRow("c", "conv2d", reason=FloatReason(FloatCause.SETTINGS, "float")),
        SiteRow("d", "matmul", reason=FloatReason(FloatCause.SETTINGS, "float")),
    ]
    report = Report("t", rows)
    assert [r.name for r in report.sites] == ["a", "d"]
    assert report.macs_share == 0.0
    assert Report("nothing").macs_share == 0.0


def test_converted_rows_name_the_kernel_and_keep_the_calibrated_facts() -> None:
    before = {row.name: row for row in calibrated("SwinIR/light", PAPER).report().quantized}
    after = converted("SwinIR/light", PAPER).report().quantized
    assert [row.name for row in after] == list(before)
    for row in after:
        assert row.kernel
        assert row.sqnr_db == before[row.name].sqnr_db
        assert isinstance(row.bounds, tuple)
        assert row.bounds == pytest.approx(before[row.name].bounds, rel=1e-3)
        assert (row.joint_scale is None) == (before[row.name].joint_scale is None)


def test_reports_survive_json() -> None:
    data = converted("SwinIR/light", PAPER).report().to_dict()
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again["macs_share"] == data["macs_share"]
    assert [row["name"] for row in again["sites"]] == [row["name"] for row in data["sites"]]


def test_a_report_reads_line_by_line() -> None:
    report = converted("SwinIR/light", PAPER).report()
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.rows)
    assert f"{len(report.quantized)} of {len(report.rows)}" in lines[0]
    first = report.rows[0]
    assert all(part in lines[1] for part in (first.name, first.kind, f"W{first.weight_bits}A{first.act_bits}"))
    assert "float: the deploy profile" in str(converted("SwinIR/light", DEPLOY).report())
