"""The demonstration, on a tiny model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import harmoq_ao as h
from harmoq_ao.conversion.save import folder_bytes
from harmoq_ao.recipes.demo import VARIANTS, busiest_square, evaluation_images, quick, run_demo
from harmoq_ao.zoo import LoadedModel
from tests.models import BY_NAME


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 3))
def test_the_busiest_square_is_found(seed: int, side: int, step: int) -> None:
    values = np.random.default_rng(seed).random((9, 7))
    corners = [(r, c) for r in range(0, 10 - side, step) for c in range(0, 8 - side, step)]
    best = max(corners, key=lambda at: values[at[0] : at[0] + side, at[1] : at[1] + side].sum())
    assert busiest_square(values, side, step) == best


def test_evaluation_images_pair_up() -> None:
    for low, reference in evaluation_images(2, 64).values():
        assert low.size == (32, 32)
        assert reference.size == (64, 64)


def test_a_small_run(tmp_path: Path) -> None:
    entry = BY_NAME["SwinIR/light"]
    text = io.StringIO()
    rows = run_demo(
        tmp_path / "out", quick(), lambda: LoadedModel(entry.build(), "SwinIR", 2, 3, 3), Console(file=text, width=160)
    )
    assert [row.name for row in rows] == ["float", "bicubic", *(v.name for v in VARIANTS)]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for row, stored in zip(rows, results["rows"], strict=True):
        assert stored["psnr_y"] == row.psnr_y
        assert f"{row.psnr_y:.3f}" in text.getvalue()
    for row, variant in zip(rows[2:], VARIANTS, strict=True):
        folder = tmp_path / "out" / f"swinir-x2-{variant.slug}"
        assert row.bytes == folder_bytes(folder)
        report = h.load_quantized(folder).report()
        assert row.quantized == sum(site.quantized for site in report.sites)
        assert row.seconds is not None
        assert row.seconds > 0
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert image.width > 600


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(h.HarmoqError, match="cannot be created"):
        run_demo(tmp_path / "out", quick())
