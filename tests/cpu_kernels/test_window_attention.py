"""The attention kernel equals plain torch: float within bounds, integers bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harmoq_ao.common.errors import KernelError
from harmoq_ao.cpu_kernels import window_attention as attention
from harmoq_ao.quant.integer_reference import Affine, MatmulOperand, quantize_codes, static_qparams
from tests.strategies import SEEDS, bit_widths, joint_scales

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    windows: int
    queries: int
    keys: int
    heads: int
    head_dim: int


@st.composite
def shapes(draw: st.DrawFn, most: int = 70) -> Shape:
    return Shape(
        draw(st.integers(1, 4)),
        draw(st.integers(1, most)),
        draw(st.integers(1, most)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from((1, 2, 3, 8, 10, 16, 17, 24, 30, 32, 33, 64, 70))),
    )


@st.composite
def attentions(draw: st.DrawFn, most: int = 70, magnitude: float = 1.0) -> Arguments:
    """Arguments of the kernel, `out` filled with a mark where nothing is written."""
    shape, generator = draw(shapes(most)), torch.Generator().manual_seed(draw(SEEDS))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    channels, block = shape.heads * shape.head_dim, draw(st.sampled_from((16, 32, 64)))
    block = min(block, -(-shape.queries // 16) * 16)
    tokens = max(shape.windows * shape.queries, 5)
    packed = draw(st.booleans())  # one matrix for all three, its rows longer than dense ones
    count = 3 if packed else 1
    columns = count * channels + 7
    matrices = [
        (magnitude * torch.randn(tokens, columns, generator=generator)).to(dtype) for _ in range(1 if packed else 3)
    ]
    q, k, v = matrices * 3 if packed else matrices
    arguments: Arguments = {
        "out": torch.full(
            (tokens + 3, channels + 5), 77.0, dtype=draw(st.sampled_from((torch.float32, torch.bfloat16)))
        ),
        "out_rows": _out_rows(shape, tokens + 3, generator),
        "out_col": draw(st.integers(0, 5)),
        "q": q[:, 2:],
        "q_col": 3,
        "k": k,
        "k_col": channels if packed else 0,
        "v": v,
        "v_col": 2 * channels if packed else 1,
        "q_rows": _rows((shape.windows, shape.queries), tokens, generator),
        "k_rows": _rows((shape.windows, shape.keys), tokens, generator),
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "q_factor": torch.rand(shape.heads, generator=generator) * shape.head_dim**-0.5 + 0.05,
        "score_factor": torch.rand(shape.heads, generator=generator) + 0.5,
        "block": block,
    }
    if draw(st.booleans()):
        arguments["bias"] = attention.pack_bias(
            torch.randn(shape.heads, shape.queries, shape.keys, generator=generator), block
        )
    return arguments | _mask(draw(st.sampled_from(("none", "region", "table"))), shape, block, generator)


def _rows(size: tuple[int, int], tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-1, tokens, size, dtype=torch.int32, generator=generator)


def _out_rows(shape: Shape, rows: int, generator: torch.Generator) -> Tensor:
    """Each row at most once, some queries not written."""
    count = shape.windows * shape.queries
    order = torch.randperm(max(rows, count), generator=generator)[:count].to(torch.int32)
    order[torch.rand(count, generator=generator) < 0.1] = -1
    return torch.where(order < rows, order, -1).view(shape.windows, shape.queries)


def _mask(kind: str, shape: Shape, block: int, generator: torch.Generator) -> Arguments:
    if kind == "region":
        q_region = torch.randint(0, 3, (shape.windows, shape.queries), dtype=torch.int32, generator=generator)
        k_region = torch.randint(0, 3, (shape.windows, shape.keys), dtype=torch.int32, generator=generator)
        q_region[0], k_region[0] = 5, 5  # one window without a mask
        return {"q_region": q_region, "k_region": k_region, "mask_value": -100.0}
    if kind == "table":
        masks = torch.where(torch.rand(2, shape.queries, shape.keys, generator=generator) < 0.3, -100.0, 0.0)
        index = torch.randint(-1, 2, (shape.windows,), dtype=torch.int32, generator=generator)
        return {"mask_table": attention.pack_bias(masks, block), "mask_index": index}
    return {}


def _expected(arguments: Arguments, **options: Any) -> Tensor:
    out = arguments["out"].double()
    attention.reference(**arguments | {"out": out} | options)
    return out


def _actual(arguments: Arguments, **options: Any) -> Tensor:
    out = arguments["out"].clone()
    attention.window_attention(**arguments | {"out": out} | options)
    return out


@given(arguments=attentions(), half=st.booleans())
def test_float_attention_equals_float64(arguments: Arguments, half: bool) -> None:
    expected, actual = _expected(arguments, dtype=torch.float64), _actual(arguments, half=half)
    assert torch.equal(actual == 77.0, expected == 77.0)
    tolerance = (0.03 if half else 2e-5) + (0.03 if actual.dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


@given(arguments=attentions(magnitude=30.0))
@settings(max_examples=20)
def test_scores_too_large_to_exponentiate_at_once(arguments: Arguments) -> None:
    expected, actual = _expected(arguments, dtype=torch.float64), _actual(arguments)
    torch.testing.assert_close(actual.double(), expected, atol=0.2, rtol=2e-2)


@given(queries=st.sampled_from((16, 200, 256)), keys=st.sampled_from((256, 333, 1024)), half=st.booleans(), seed=SEEDS)
@settings(max_examples=6)
def test_large_windows(queries: int, keys: int, half: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    arguments = _plain(Shape(2, queries, keys, 2, 24), generator)
    expected, actual = _expected(arguments, dtype=torch.float64), _actual(arguments, half=half)
    torch.testing.assert_close(actual.double(), expected, atol=0.02 if half else 2e-5, rtol=0)


@pytest.mark.parametrize("head_dim", [1, 7, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 70, 100])
@pytest.mark.parametrize("half", [False, True])
def test_heads_of_any_width_do_not_reach_into_each_other(head_dim: int, half: bool) -> None:
    arguments = _plain(Shape(2, 20, 30, 3, head_dim), torch.Generator().manual_seed(head_dim))
    arguments["q_rows"][0, 3] = arguments["k_rows"][1, 5] = -1
    expected, actual = _expected(arguments, dtype=torch.float64), _actual(arguments, half=half)
    torch.testing.assert_close(actual.double(), expected, atol=0.03 if half else 2e-5, rtol=0)
    bfloat16 = arguments | {name: arguments[name].bfloat16() for name in "qkv"}
    expected, actual = _expected(bfloat16, dtype=torch.float64), _actual(bfloat16, half=half)
    torch.testing.assert_close(actual.double(), expected, atol=0.03 if half else 2e-5, rtol=0)


def _plain(shape: Shape, generator: torch.Generator) -> Arguments:
    channels, block = shape.heads * shape.head_dim, attention.query_block(shape.queries, shape.keys)
    tokens = max(shape.queries, shape.keys) * shape.windows
    x = torch.randn(tokens, 3 * channels, generator=generator)
    return {
        "out": torch.zeros(tokens, channels),
        "out_rows": torch.arange(shape.windows * shape.queries, dtype=torch.int32).view(shape.windows, -1),
        "out_col": 0,
        "q": x,
        "q_col": 0,
        "k": x,
        "k_col": channels,
        "v": x,
        "v_col": 2 * channels,
        "q_rows": torch.randperm(tokens, generator=generator)[: shape.windows * shape.queries]
        .to(torch.int32)
        .view(shape.windows, -1),
        "k_rows": torch.randperm(tokens, generator=generator)[: shape.windows * shape.keys]
        .to(torch.int32)
        .view(shape.windows, -1),
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "q_factor": torch.full((shape.heads,), shape.head_dim**-0.5),
        "score_factor": torch.ones(shape.heads),
        "bias": attention.pack_bias(torch.randn(shape.heads, shape.queries, shape.keys, generator=generator), block),
        "block": block,
    }


# --- integers ---------------------------------------------------------------------------------------------------------


@st.composite
def quantizers(draw: st.DrawFn, head_dim: int, relative: bool) -> tuple[Tensor, Tensor]:
    """Of q, k, the map and v, with a joint scale or without; some ranges clip."""
    scale = draw(joint_scales(head_dim)) if draw(st.booleans()) else None
    reach = draw(st.sampled_from((0.5, 3.0)))
    q, k, v = (_operand(draw(bit_widths()), -reach, reach * 1.1) for _ in range(3))
    upper = draw(st.sampled_from((0.3, 1.0))) if not relative else draw(st.sampled_from((0.8, 1.0)))
    attention_map = _operand(draw(bit_widths()), draw(st.sampled_from((0.0, -0.05, 0.02))), upper)
    if scale is not None:
        q = MatmulOperand(q.bits, q.act, scale)
        k = MatmulOperand(k.bits, k.act, scale.reciprocal()[:, None])
    return attention.pack_quantizers(q, k, attention_map, v, head_dim)


def _operand(bits: int, lower: float, upper: float) -> MatmulOperand:
    step = torch.tensor((upper - lower) / (2**bits - 1))
    return MatmulOperand(bits, Affine(step, torch.tensor(lower), bits))


def _shown(arguments: Arguments) -> Arguments:
    windows, queries = arguments["q_rows"].shape
    keys, heads = arguments["k_rows"].shape[1], arguments["heads"]
    size = (windows, heads, queries)
    return {
        "score_accumulators": torch.zeros(*size, keys, dtype=torch.int32),
        "map_codes": torch.zeros(*size, keys, dtype=torch.uint8),
        "value_accumulators": torch.zeros(*size, arguments["head_dim"], dtype=torch.int32),
    }


@given(data=st.data(), arguments=attentions(), relative=st.booleans())
def test_integers_equal_the_reference(data: st.DataObject, arguments: Arguments, relative: bool) -> None:
    bounds, reciprocals = data.draw(quantizers(arguments["head_dim"], relative))
    arguments |= {"quantizers": bounds, "reciprocals": reciprocals, "relative": relative}
    shown, expected_shown = _shown(arguments), _shown(arguments)
    actual, expected = _actual(arguments, **shown), _expected(arguments, **expected_shown)
    assert torch.equal(shown["score_accumulators"], expected_shown["score_accumulators"])
    # The map is made of float32 exponentials: an entry on the edge between two codes may fall to either side.
    steps = shown["map_codes"].int() - expected_shown["map_codes"].int()
    assert int(steps.abs().max()) <= 1
    assert int(steps.count_nonzero()) <= 3 + steps.numel() // 2000
    values = _value_codes(arguments)
    sums = shown["map_codes"].long() @ values.long()
    assert torch.equal(shown["value_accumulators"].long(), sums)
    if not steps.any():
        assert torch.equal(shown["value_accumulators"], expected_shown["value_accumulators"])
        limit = 1e-4 * float(expected[expected != 77.0].abs().max() if (expected != 77.0).any() else 0) + 1e-5
        rtol = 1e-2 if actual.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(actual.double(), expected, atol=limit, rtol=rtol)


@given(data=st.data(), arguments=attentions(), relative=st.booleans())
def test_given_codes_are_those_of_their_values(data: st.DataObject, arguments: Arguments, relative: bool) -> None:
    """Codes in: every sum is that of the values; codes out: those of the values that would be written."""
    heads, head_dim = arguments["heads"], arguments["head_dim"]
    bounds, reciprocals = data.draw(quantizers(head_dim, relative))
    arguments |= {"quantizers": bounds, "reciprocals": reciprocals, "relative": relative}
    arguments["out"] = arguments["out"].float()
    shown, of_codes = _shown(arguments), _shown(arguments)
    values = _actual(arguments, **shown)
    codes = _actual(arguments | _as_codes(arguments), **of_codes)
    assert torch.equal(codes, values)
    assert all(torch.equal(shown[name], of_codes[name]) for name in shown)
    expected = _expected(arguments | _as_codes(arguments), **(expected_shown := _shown(arguments)))
    assert torch.equal(shown["score_accumulators"], expected_shown["score_accumulators"])
    assert torch.equal(expected, _expected(arguments))
    columns = slice(arguments["out_col"], arguments["out_col"] + heads * head_dim)
    quantizer = torch.rand(2, heads * head_dim) * 7
    out = torch.full(values.shape, 77, dtype=torch.uint8)
    actual = _actual(arguments | {"out": out}, out_quantizer=quantizer, out_bits=3)
    written = arguments["out_rows"][arguments["out_rows"] >= 0].long()
    wanted = torch.full_like(out, 77)
    wanted[written, columns] = quantize_codes(values[written, columns], quantizer[0], quantizer[1], bits=3)
    assert torch.equal(actual, wanted)
    attention.reference(**arguments | {"out": out, "out_quantizer": quantizer, "out_bits": 3})
    assert int((out.int() - wanted.int()).abs().max()) <= 1 or not torch.allclose(expected.float(), values, atol=1e-3)


def _as_codes(arguments: Arguments) -> Arguments:
    """Codes instead of q, k and v, in matrices of their own."""
    heads, head_dim = arguments["heads"], arguments["head_dim"]
    made: Arguments = {}
    for name, place in (("q", 0), ("k", 1), ("v", 3)):
        first = arguments[f"{name}_col"]
        values = arguments[name][:, first : first + heads * head_dim].float().unflatten(-1, (heads, head_dim))
        values = values * arguments["q_factor"][:, None] if name == "q" else values
        offset, top = arguments["quantizers"][place, 2:].tolist()
        found = quantize_codes(values, arguments["reciprocals"][place], offset, int(top).bit_length())
        made |= {name: found.flatten(1), f"{name}_col": 0}
    return made


def _value_codes(arguments: Arguments) -> Tensor:
    """``[W, heads, M, head_dim]``."""
    heads, head_dim, rows = arguments["heads"], arguments["head_dim"], arguments["k_rows"].long()
    columns = slice(arguments["v_col"], arguments["v_col"] + heads * head_dim)
    v = torch.cat([arguments["v"][:, columns].float(), torch.zeros(1, heads * head_dim)])[rows]
    offset, top = arguments["quantizers"][3, 2:].tolist()
    return quantize_codes(
        v.unflatten(-1, (heads, head_dim)).transpose(1, 2), arguments["reciprocals"][3], offset, int(top).bit_length()
    )


def test_codes_on_ties_and_beyond_the_range_equal_the_reference() -> None:
    """Values that lie exactly between two codes, infinities, and a joint scale."""
    generator = torch.Generator().manual_seed(0)
    arguments = _plain(Shape(1, 40, 40, 1, 8), generator)
    x = torch.randint(-30, 30, arguments["q"].shape, generator=generator) / 4.0
    x[:4] = torch.tensor([1e30, -1e30, 1e4, -1e4])[:, None]
    arguments |= {"q": x, "k": x, "v": x, "q_factor": torch.ones(1)}
    operand = MatmulOperand(4, Affine(torch.tensor(0.5), torch.tensor(-3.5), 4))
    bounds, reciprocals = attention.pack_quantizers(operand, operand, _operand(8, 0.0, 1.0), operand, 8)
    arguments |= {"quantizers": bounds, "reciprocals": reciprocals}
    shown, expected = _shown(arguments), _shown(arguments)
    _actual(arguments, **shown)
    _expected(arguments, **expected)
    assert torch.equal(shown["score_accumulators"], expected["score_accumulators"])


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_threads_do_not_change_the_result(half: bool) -> None:
    arguments = _plain(Shape(5, 64, 64, 3, 10), torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_actual(arguments, half=half))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_other_products_before_and_after() -> None:
    """torch's own products on the same threads find the tiles as they expect them."""
    arguments = _plain(Shape(4, 64, 64, 2, 16), torch.Generator().manual_seed(2))
    a = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    product, result = a @ a.T, _actual(arguments, half=True)
    for _ in range(3):
        assert torch.equal(a @ a.T, product)
        assert torch.equal(_actual(arguments, half=True), result)


def test_not_a_number_does_not_crash() -> None:
    for options in ({"half": True}, {"half": False}, {"quantized": True}):
        arguments = _plain(Shape(2, 20, 30, 2, 10), torch.Generator().manual_seed(4))
        arguments["q"][3] = torch.nan
        if options.pop("quantized", False):
            x, attention_map = _operand(8, -3.0, 3.0), _operand(8, 0.0, 1.0)
            bounds, reciprocals = attention.pack_quantizers(x, x, attention_map, x, 10)
            arguments |= {"quantizers": bounds, "reciprocals": reciprocals, "relative": True}
        assert _actual(arguments, **options).shape == arguments["out"].shape


def test_rows_beyond_the_tokens_are_refused() -> None:
    arguments = _plain(Shape(1, 16, 16, 1, 8), torch.Generator().manual_seed(5))
    for name in ("q_rows", "k_rows", "out_rows"):
        rows = arguments[name].clone()
        rows[0, 3] = len(arguments["q"])
        with pytest.raises(RuntimeError, match=name):
            _actual(arguments | {name: rows})


def test_operands_that_cannot_be_packed_are_refused() -> None:
    operand = _operand(8, 0.0, 1.0)
    scaled = MatmulOperand(8, operand.act, torch.ones(8))
    with pytest.raises(KernelError, match="joint scale"):
        attention.pack_quantizers(operand, operand, scaled, operand, 8)
    with pytest.raises(KernelError, match="bounds from the data"):
        attention.pack_quantizers(MatmulOperand(8), operand, operand, operand, 8)


def test_packed_quantizers_are_those_of_the_reference() -> None:
    operand = MatmulOperand(4, _operand(4, -1.0, 2.0).act, torch.rand(8) + 0.5)
    bounds, reciprocals = attention.pack_quantizers(operand, operand, _operand(2, 0.0, 1.0), _operand(3, -1.0, 1.0), 8)
    assert operand.act is not None
    reciprocal, offset = static_qparams(operand.act, operand.joint_scale)
    assert torch.equal(reciprocals[0], reciprocal)
    assert torch.equal(bounds[0], torch.stack([operand.act.step, operand.act.lower, offset, torch.tensor(15.0)]))


@given(size=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 20)), block=st.sampled_from((16, 32, 64)))
def test_packing_a_bias_loses_nothing(size: tuple[int, int, int], block: int) -> None:
    bias = torch.arange(size[0] * size[1] * size[2]).float().view(size)
    assert torch.equal(attention.unpack_bias(attention.pack_bias(bias, block), size[1]), bias)


def test_the_operator_has_a_fake_implementation() -> None:
    arguments = _plain(Shape(1, 16, 16, 1, 8), torch.Generator().manual_seed(6))
    attention.operator()
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        attention.window_attention(**fake)
    assert fake["out"].shape == arguments["out"].shape
