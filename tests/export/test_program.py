"""Programs of `torch.export`: written, loaded again, and the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harmoq_ao.common.errors import ExportError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.export.program import export_program, load_program
from tests.models import converted, images


def test_a_program_computes_the_same_bits(tmp_path: Path) -> None:
    model, image = converted("SwinIR/light", HarmoqConfig(4, 4)), images(1, (16, 24), seed=7)[0]
    assert export_program(model, tmp_path / "m.pt2", (16, 24)) == (16, 24)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    with torch.no_grad():
        assert torch.equal(load_program(tmp_path / "m.pt2")(image), model(image))


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"no archive")
    with pytest.raises(ExportError, match="cannot be read"):
        load_program(tmp_path / "m.pt2")
    model = converted("linears", HarmoqConfig(8, 8))
    with pytest.raises(ExportError, match="images of this size"):
        export_program(model, tmp_path / "n.pt2", (0, 16))
    with pytest.raises(ExportError, match="convert_harmoq"):
        export_program(torch.nn.Identity(), tmp_path / "n.pt2")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
