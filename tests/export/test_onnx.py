"""ONNX files: valid, with our integers in them, and the same outputs in other engines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.common.errors import ExportError, OutputError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.cpu_kernels import library
from harmoq_ao.export.check import onnx_engines
from harmoq_ao.export.onnx import OPSET, Exported, export_onnx
from harmoq_ao.programs.program import Programs
from harmoq_ao.sites.quantized import QuantizedLinear
from tests.models import PER_TOKEN, build, converted, images

onnx = pytest.importorskip("onnx", reason="needs ONNX: pip install harmoq-ao[onnx]")
pytest.importorskip("onnxscript", reason="needs ONNX: pip install harmoq-ao[onnx]")

LEVEL = 1 / 255


def exported(model: QuantizedModel, path: Path, size: tuple[int, int] | None = (16, 16)) -> tuple[Exported, Any]:
    written = export_onnx(model, path, size)
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import if not o.domain] == [("", OPSET)]
    return written, proto


def assert_same_in_every_engine(model: QuantizedModel, path: Path, image: Tensor) -> None:
    """Within a level nearly everywhere: a tie of rounding may take a code to the other side."""
    expected = model(image)
    engines = onnx_engines(path)
    assert engines
    for name, run in engines.items():
        found = run(image)
        assert found.shape == expected.shape, name
        if name == "OpenVINO" and saturates(model):
            continue
        levels = (found - expected).abs() / LEVEL
        assert (levels > 1).double().mean() <= 0.002, name
        assert levels.median() < 0.05, name


def saturates(model: QuantizedModel) -> bool:
    """Whether OpenVINO's sums are wrong on this CPU, as docs/runtimes.md says."""
    from harmoq_ao.runtime.openvino.ops import pairs_saturate

    return max(site.settings.weight.bits for site in model.sites().values()) > 6 and pairs_saturate()


def initializers(proto: Any, kinds: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer if i.data_type in kinds}


@pytest.mark.parametrize(
    ("bits", "kind", "stored"),
    [
        (8, "INT8", lambda w: w),
        (4, "INT4", lambda w: w),
        (3, "INT4", lambda w: 2 * w + 1),
        (5, "INT8", lambda w: 2 * w + 1),
    ],
    ids=["8", "4", "3", "5"],
)
def test_weights_are_our_codes_and_sizes_are_free(tmp_path: Path, bits: int, kind: str, stored: Any) -> None:
    model = converted("linears", HarmoqConfig(bits, 8))
    written, proto = exported(model, tmp_path / "m.onnx", None)
    assert (written.size, written.note) == (None, None)
    found = initializers(proto, (getattr(onnx.TensorProto, kind),))
    sites = [s for s in model.sites().values() if isinstance(s, QuantizedLinear)]
    assert len(found) == len(sites) == 2
    for site in sites:
        codes = stored(site.weight_codes().numpy().astype(int)).T
        assert any(v.shape == codes.shape and np.array_equal(v.astype(int), codes) for v in found.values())
    quantizing = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantizing) == len(sites)
    assert written.batch is None
    for size in ((16, 16), (24, 40)):
        assert_same_in_every_engine(model, tmp_path / "m.onnx", images(1, size, seed=7)[0])


@pytest.mark.parametrize(
    "config",
    [
        HarmoqConfig(4, 4, rules=PER_TOKEN),
        HarmoqConfig(4, 6, conv_bits=6, matmul_bits=8, rules=(SiteRule("*", dynamic=False),)),
        pytest.param(HarmoqConfig(4, 4, rules=PER_TOKEN, matmul_bits=8), marks=pytest.mark.slow),
        HarmoqConfig(4, 32),
        HarmoqConfig(4, 4, "paper"),
    ],
    ids=["per token", "convolutions and products", "products per token", "weights alone", "relative maps"],
)
def test_every_kind_of_site(tmp_path: Path, config: HarmoqConfig) -> None:
    model = converted("forms", config)
    _, proto = exported(model, tmp_path / "m.onnx")
    assert any(n.op_type == "DequantizeLinear" for n in proto.graph.node)
    assert_same_in_every_engine(model, tmp_path / "m.onnx", images(1, seed=7)[0])


def test_ranges_relative_to_a_root_mean_square_fit_every_size(tmp_path: Path) -> None:
    model = converted("channels", HarmoqConfig(8, 8, "paper"))
    written, _ = exported(model, tmp_path / "m.onnx", None)
    assert (written.size, written.note) == (None, None)
    for size in ((16, 16), (24, 40)):
        assert_same_in_every_engine(model, tmp_path / "m.onnx", images(1, size, seed=7)[0])


def test_a_transformer_at_8_bits(tmp_path: Path) -> None:
    model = converted("SwinIR/light", HarmoqConfig(8, 8))
    image = images(1, seed=7)[0]
    before = model(image)
    written, proto = exported(model, tmp_path / "m.onnx")
    assert torch.equal(model(image), before)
    assert_same_in_every_engine(model, tmp_path / "m.onnx", image)
    sites = [s for s in model.sites().values() if isinstance(s, QuantizedLinear)]
    assert len(initializers(proto, (onnx.TensorProto.INT8,))) == len(sites)
    assert written.batch is None
    assert_same_in_every_engine(model, tmp_path / "m.onnx", torch.cat(images(3, seed=8)))
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert metadata["harmoq_batch"] == "any"
    assert metadata["harmoq_size"] == "16x16 (asked for)"
    assert metadata["harmoq_scale"] == str(model.traits.scale)


@pytest.mark.slow
def test_masks_do_not_grow_with_the_image(tmp_path: Path) -> None:
    model = converted("SwinIR/light", HarmoqConfig(8, 8))
    small, large = (exported(model, tmp_path / "m.onnx", (side, side))[1].ByteSize() for side in (32, 96))
    assert large <= 1.1 * small, "nine times the windows"


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("linears", HarmoqConfig(8, 8))
    with pytest.raises(OutputError):
        export_onnx(model, tmp_path / "nowhere" / "m.onnx", (16, 16))
    with pytest.raises(ExportError, match="convert_harmoq"):
        export_onnx(torch.nn.Identity(), tmp_path / "m.onnx")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"harmoq-ao\[onnx\]"):
        export_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_is_compared_with_the_modules_not_with_fused_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(Programs, "_program", lambda *call: made.append(call))
    model = converted("linears", HarmoqConfig(8, 8))
    model(images(1, (64, 64))[0])
    assert made or not library.status().available
    made.clear()
    exported(model, tmp_path / "m.onnx", (64, 64))
    assert not made


@pytest.mark.slow
def test_free_sizes_are_said_only_where_they_hold(tmp_path: Path) -> None:
    prepared = h.calibrate(h.prepare_harmoq(build("SwinIR/light")), images(1, (24, 24)))
    model = h.convert_harmoq(prepared)
    written, proto = exported(model, tmp_path / "free.onnx", None)
    assert written.size is None, written.note
    assert written.multiple == 8, "its windows"
    assert {"harmoq_size_multiple": "8"}.items() <= {p.key: p.value for p in proto.metadata_props}.items()
    assert "ONNX Runtime" in onnx_engines(tmp_path / "free.onnx")
    for size in ((8, 24), (40, 16)):
        assert_same_in_every_engine(model, tmp_path / "free.onnx", images(1, size)[0])
