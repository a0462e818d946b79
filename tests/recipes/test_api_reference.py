"""The API reference is built from the docstrings and holds the whole public surface."""

from __future__ import annotations

from pathlib import Path

import pytest

import harmoq_ao

pytest.importorskip("griffe2md", reason="the generator of the reference is not installed")


def test_every_public_name_is_there_once_and_in_order(tmp_path: Path) -> None:
    from harmoq_ao.recipes.api_reference import main

    main([str(tmp_path / "docs" / "api.md")])
    page = (tmp_path / "docs" / "api.md").read_text()
    for name in set(harmoq_ao.__all__) - {"__version__"}:
        assert page.count(f"\n### `{name}`\n") == 1, name
    names = "load_image HarmoqConfig load_model prepare_harmoq calibrate harmonize convert_harmoq Upscaler prepare_with"
    pipeline = [*names.split(), "export_onnx", "write_report", "HarmoqError"]
    places = [page.index(f"\n### `{name}`\n") for name in pipeline]
    assert places == sorted(places)
    assert "Raises" in page
    assert ":class:" not in page
    assert "](#" not in page
