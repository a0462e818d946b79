"""OpenVINO IR: our integers in files that run without torch, as `lower_openvino` runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from harmoq_ao.common.errors import ExportError, OutputError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.export import export_openvino
from harmoq_ao.export.check import engines
from harmoq_ao.runtime.openvino import lower_openvino
from harmoq_ao.runtime.openvino.compiling import compile_on_cpu
from tests.models import converted, images

pytest.importorskip("openvino", reason="needs OpenVINO: pip install harmoq-ao[openvino]")
pytest.importorskip("onnxscript", reason="needs ONNX: pip install harmoq-ao[onnx]")

from harmoq_ao.runtime.openvino.ops import pairs_saturate


@pytest.mark.parametrize(
    ("name", "size"), [("linears", None), pytest.param("SwinIR/light", (16, 16), marks=pytest.mark.slow)]
)
def test_runs_as_the_lowered_model(tmp_path: Path, name: str, size: tuple[int, int] | None) -> None:
    model = converted(name, HarmoqConfig(6 if pairs_saturate() else 8, 8))
    written = export_openvino(model, tmp_path / "m.xml", size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    assert (written.size, written.batch) == (size, 1)
    for shape in [size] if size else [(16, 16), (24, 40)]:
        image = images(1, shape, seed=7)[0]
        expected = lower_openvino(model, precision="f32")(image)
        found = engines(tmp_path / "m.xml", "openvino")["OpenVINO"](image)
        difference = (found - expected).abs()
        assert (difference > 1 / 255).double().mean() <= 0.002, "ties of rounding"
        assert difference.median() <= 1e-5


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the CPU has no integer products")
def test_runs_in_integers(tmp_path: Path) -> None:
    model = converted("linears", HarmoqConfig(8, 8))
    export_openvino(model, tmp_path / "m.xml", (16, 16))
    compiled = compile_on_cpu(tmp_path / "m.xml")
    ops = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    products = [op["runtimePrecision"].astype(str) for op in ops if op["layerType"].astype(str) == "FullyConnected"]
    assert products == ["u8"] * len(model.sites())


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("linears", HarmoqConfig(8, 8))
    with pytest.raises(OutputError):
        export_openvino(model, tmp_path / "nowhere" / "m.xml", (16, 16))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ExportError, match=r"harmoq-ao\[openvino\]"):
        export_openvino(model, tmp_path / "m.xml")
    assert not list(tmp_path.iterdir())
