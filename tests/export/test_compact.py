"""Compact constants: the same bits, in fewer bytes."""

from __future__ import annotations

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir", reason="needs ONNX: pip install harmoq-ao[onnx]")

from harmoq_ao.export.compact import compact_constants, narrowed, repeated_slices  # noqa: E402


def mask(windows: int, tokens: int) -> np.ndarray:
    """Two different windows, many times."""
    generator = np.random.default_rng(0)
    two = -100.0 * generator.integers(0, 2, (2, 1, tokens, tokens))
    return two[generator.integers(0, 2, windows)].astype(np.float32)


def bias(heads: int, tokens: int) -> np.ndarray:
    """One row of a table for every pair of tokens as far apart."""
    table = np.random.default_rng(1).standard_normal((heads, 2 * tokens - 1)).astype(np.float32)
    return table[:, np.arange(tokens)[:, None] - np.arange(tokens) + tokens - 1][None]


@pytest.mark.parametrize(("array", "axis", "count"), [(mask(64, 8), 0, 2), (bias(3, 32), 1, 63)], ids=["mask", "bias"])
def test_slices_are_stored_once(array: np.ndarray, axis: int, count: int) -> None:
    found = repeated_slices(array)
    assert found is not None
    slices, index, along = found
    assert (along, slices.shape[axis]) == (axis, count)
    assert slices.take(index, axis).reshape(array.shape).tobytes() == array.tobytes()


def test_what_does_not_repeat_stays() -> None:
    assert repeated_slices(np.random.default_rng(0).random((16, 16, 16))) is None


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([0.0, -100.0], np.float32), np.int8),
        (np.array([0, 40_000]), np.int32),
        (np.array([-129, 5]), np.int16),
        (np.array([0.5, 1.0], np.float32), np.float32),
        (np.array([-0.0, 1.0], np.float32), np.float32),
        (np.array([-np.inf, 0.0], np.float32), np.float32),
        (np.array([True, False]), np.bool_),
    ],
)
def test_whole_numbers_are_narrowed(values: np.ndarray, kind: type) -> None:
    found = narrowed(values)
    assert found.dtype == kind
    assert found.astype(values.dtype).tobytes() == values.tobytes()


def test_the_graph_computes_the_same() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    tables = {"mask": mask(64, 8), "again": mask(64, 8), "bias": bias(3, 8), "noise": np.random.rand(64, 3, 8, 8)}
    tables = {name: table.astype(np.float32) for name, table in tables.items()}
    image = ir.Value(name="image", shape=ir.Shape(["n", 3, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    initializers = [ir.Value(name=name, const_value=ir.Tensor(table, name=name)) for name, table in tables.items()]
    for value in initializers:
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    nodes, last = [], image
    for value in initializers:
        nodes.append(ir.node("Add", [last, value]))
        last = nodes[-1].outputs[0]
    last.name, last.type, last.shape = "sum", image.type, ir.Shape(["m", 3, 8, 8])
    graph = ir.Graph([image], [last], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    before = len(ir.to_proto(model).SerializeToString())
    compact_constants(model)
    proto = ir.to_proto(model).SerializeToString()
    assert len(proto) < before - 2 * tables["mask"].nbytes + 4096, "both masks, but for their windows"
    x = np.random.default_rng(3).random((64, 3, 8, 8)).astype(np.float32)
    found = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {"image": x})[0]
    assert np.allclose(found, x + sum(tables.values()), atol=1e-4)
