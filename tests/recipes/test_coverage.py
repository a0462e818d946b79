"""The coverage table."""

from __future__ import annotations

from dataclasses import replace

from harmoq_ao.recipes.coverage import cover, markdown
from tests.models import BY_NAME


def test_one_architecture() -> None:
    entry = replace(BY_NAME["SwinIR/light"], sizes=((16, 16), (13, 16)))
    found = cover(entry)
    assert found.error is None
    assert found.quantized == found.sites > 0
    assert found.unequal == ()
    assert 0 < found.macs_share < 1
    assert all(kind == "conv2d" for kind, _ in found.floats)
    document = markdown([found])
    assert f"| SwinIR/light | {found.sites} | {found.quantized} |" in document
    assert "16x16, 13x16 (1, 3)" in document


def test_differences_and_failures_are_written_down() -> None:
    entry = replace(BY_NAME["IPT"], notes="patches only")
    found = cover(replace(entry, sizes=((12, 12),), batches=(1,)))
    document = markdown([replace(found, unequal=("12x12 (batch 1)",)), replace(found, error="no way")])
    assert "**differs** at 12x12 (batch 1)" in document
    assert "not prepared: no way" in document
    assert "patches only" in document
