"""Observers: exact ranges, bounded memory, and bounds that follow from the statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.quant.observers import (
    OBSERVERS,
    HistogramObserver,
    MinMaxObserver,
    MSEObserver,
    OperandObserver,
    PercentileObserver,
)
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme, fake_quantize, snap_bounds
from tests.strategies import float_tensors, joint_scales, static_specs

NAMES = sorted(OBSERVERS)


def observed(name: str, batches: list[Tensor], spec: QuantizerSpec | None = None, **options: Any) -> OperandObserver:
    observer = OBSERVERS[name](spec or QuantizerSpec(4), **options)
    for batch in batches:
        assert observer(batch) is batch
    return observer


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    """Batches of one operand, and its contracted axis of constant length."""
    channels, axis = draw(st.integers(1, 12)), draw(st.integers(0, 2))
    result = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(float_tensors((draw(st.integers(1, 5)), draw(st.integers(1, 9)), channels)))
        result.append(rows.movedim(-1, axis))
    return result, axis


@given(stream=batches(), name=st.sampled_from(NAMES))
def test_ranges_are_exact(stream: tuple[list[Tensor], int], name: str) -> None:
    tensors, axis = stream
    observer = observed(name, tensors, contracted_axis=axis)
    rows = torch.cat([t.movedim(axis, -1).reshape(-1, t.shape[axis]) for t in tensors])
    channel_range = observer.channel_range()
    assert channel_range is not None
    assert torch.equal(channel_range[0], rows.amin(0))
    assert torch.equal(channel_range[1], rows.amax(0))
    assert observer.value_range() == (rows.min(), rows.max())
    assert observer.rows_seen == len(rows)


@pytest.mark.parametrize("shape", [(7,), (1, 5), (1031, 3), (2, 700, 60), (3, 2, 1025)])
def test_channel_ranges_are_exact_for_sizes_that_do_not_divide(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    channel_range = observed("minmax", [x]).channel_range()
    assert channel_range is not None
    assert torch.equal(channel_range[0], x.reshape(-1, shape[-1]).amin(0))
    assert torch.equal(channel_range[1], x.reshape(-1, shape[-1]).amax(0))


@given(stream=batches())
def test_small_streams_are_sampled_completely(stream: tuple[list[Tensor], int]) -> None:
    tensors, axis = stream
    observer = observed("mse", tensors, contracted_axis=axis)
    rows = torch.cat([t.movedim(axis, -1).reshape(-1, t.shape[axis]) for t in tensors])
    assert sorted(observer.sample().tolist()) == sorted(rows.tolist())
    torch.testing.assert_close(observer.second_moment(), rows.square().mean(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("track_channels", [True, False])
def test_memory_does_not_grow_with_the_number_of_batches(name: str, track_channels: bool) -> None:
    options: dict[str, Any] = {"track_channels": track_channels, "reservoir_rows": 64, "reservoir_values": 512}
    few = observed(name, [torch.randn(10, 30, 6) for _ in range(20)], **options)
    many = observed(name, [torch.randn(10, 30, 6) for _ in range(200)], **options)
    assert few.nbytes == many.nbytes > 0
    if name != "histogram":
        assert len(many.sample()) == (64 if track_channels else 512)


def test_many_channels_get_fewer_rows() -> None:
    observer = observed("mse", [torch.randn(300, 1000)], reservoir_values=5000)
    assert observer.sample().shape == (20, 1000)


@given(stream=batches(), name=st.sampled_from(NAMES))
def test_sampling_is_reproducible_and_leaves_the_global_state_alone(
    stream: tuple[list[Tensor], int], name: str
) -> None:
    before = torch.get_rng_state()
    first, second = (observed(name, stream[0], contracted_axis=stream[1], reservoir_rows=5) for _ in range(2))
    assert torch.equal(first.sample(), second.sample())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("track_channels", [True, False])
def test_values_that_are_not_finite_are_refused_naming_the_site(value: float, name: str, track_channels: bool) -> None:
    observer = OBSERVERS[name](QuantizerSpec(4), track_channels=track_channels)
    observer.site_name = "layers.1.fc1"
    x = torch.randn(4, 5)
    x[2, 3] = value
    with pytest.raises(CalibrationError, match=r"layers\.1\.fc1 saw values that are not finite"):
        observer(x)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_without_data_are_refused_naming_the_site(name: str) -> None:
    observer = OBSERVERS[name](QuantizerSpec(4))
    observer.site_name = "head"
    with pytest.raises(CalibrationError, match="head has seen no data"):
        observer.bounds()


@pytest.mark.parametrize("name", NAMES)
def test_reset_forgets_everything(name: str) -> None:
    observer = observed(name, [torch.randn(50, 4) * 100])
    observer.reset()
    assert observer.nbytes == 0
    x = torch.randn(50, 4)
    observer(x)
    assert observer.bounds() == observed(name, [x]).bounds()
    assert observer.rows_seen == 50


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_are_ignored(name: str) -> None:
    observer = observed(name, [torch.empty(0, 4), torch.ones(2, 4), torch.empty(3, 0, 4)])
    assert observer.rows_seen == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_changing_number_of_channels_drops_the_channels_but_keeps_observing(name: str) -> None:
    observer = observed(name, [torch.full((9, 4), 2.0), torch.full((9, 6), 3.0), torch.full((9, 4), -1.0)])
    assert observer.channel_range() is None
    assert observer.second_moment() is None
    assert [bound.item() for bound in observer.value_range()] == [-1.0, 3.0]
    assert observer.sample().dim() == 1
    assert observer.rows_seen == 27
    if name == "mse":
        values, counts = observer.sample().unique(return_counts=True)
        assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {-1.0: 36, 2.0: 36, 3.0: 54}
    with pytest.raises(CalibrationError, match="joint scale"):
        observer.bounds(torch.ones(4))


@given(stream=batches(), spec=static_specs(), data=st.data())
def test_min_max_bounds_are_those_of_the_scaled_operand(
    stream: tuple[list[Tensor], int], spec: QuantizerSpec, data: st.DataObject
) -> None:
    tensors, axis = stream
    scale = data.draw(joint_scales(tensors[0].shape[axis]))
    observer = observed("minmax", tensors, spec, contracted_axis=axis, reservoir_rows=2)
    values = torch.cat([(t.movedim(axis, -1) / scale).flatten() for t in tensors])
    assert observer.bounds(scale) == snap_bounds(values.min(), values.max(), spec)


@given(x=float_tensors((40, 5)), spec=static_specs(), name=st.sampled_from(["percentile", "mse"]), data=st.data())
def test_a_scale_acts_as_if_the_scaled_operand_had_been_observed(
    x: Tensor, spec: QuantizerSpec, name: str, data: st.DataObject
) -> None:
    scale = data.draw(joint_scales(5))
    assert observed(name, [x], spec).bounds(scale) == observed(name, [x / scale], spec).bounds()
    assert observed(name, [x], spec).bounds(scale.view(1, 1, 5)) == observed(name, [x], spec).bounds(scale)


def test_a_scale_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"joint scale of 3 channels.*statistics of 5 channels"):
        observed("mse", [torch.randn(10, 5)]).bounds(torch.ones(3))


@given(x=float_tensors((500,)), spec=static_specs())
def test_mse_bounds_are_never_worse_than_min_max(x: Tensor, spec: QuantizerSpec) -> None:
    def error(name: str) -> Tensor:
        lo, hi = observed(name, [x.view(-1, 1)], spec).bounds()
        return (fake_quantize(x, lo, hi, spec.bits) - x).double().square().sum()

    assert error("mse") <= error("minmax") * (1 + 1e-5)


def test_percentile_bounds_are_percentiles() -> None:
    x = torch.arange(1001.0).view(-1, 1)
    asymmetric = PercentileObserver(QuantizerSpec(4), percentile=99.0)
    asymmetric(x)
    assert [b.item() for b in asymmetric.bounds()] == pytest.approx([10.0, 990.0], rel=1e-4)
    symmetric = PercentileObserver(QuantizerSpec(4, Scheme.SYMMETRIC), percentile=99.0)
    symmetric(x - 500.0)
    assert [b.item() for b in symmetric.bounds()] == pytest.approx([-495.0, 495.0], rel=1e-2)


@pytest.mark.parametrize("percentile", [50.0, 0.0, 100.1, -3.0])
def test_percentiles_out_of_range_are_refused(percentile: float) -> None:
    with pytest.raises(ConfigError, match="Percentile"):
        PercentileObserver(QuantizerSpec(4), percentile=percentile)


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="room for a sample"):
        MSEObserver(QuantizerSpec(4), reservoir_rows=0)
    with pytest.raises(ConfigError, match="histogram bins"):
        HistogramObserver(QuantizerSpec(4), bins=7)


@given(stream=st.lists(float_tensors((30, 3)), min_size=1, max_size=5))
def test_the_histogram_counts_everything_within_its_edges(stream: list[Tensor]) -> None:
    observer = HistogramObserver(QuantizerSpec(4), bins=64)
    for x in stream:
        observer(x)
    edges, counts = observer.histogram()
    values = torch.cat([x.flatten() for x in stream]).double()
    assert counts.sum() == values.numel()
    width = edges[1] - edges[0]
    assert edges[0] <= values.min() + 1e-9
    assert edges[-1] >= values.max() - 1e-9
    # Cumulative counts agree with exact ones up to what lies within one bin of the edge.
    below = counts.cumsum(0)[:-1]
    assert bool((below >= (values[:, None] < edges[1:-1] - width).sum(0)).all())
    assert bool((below <= (values[:, None] <= edges[1:-1] + width).sum(0)).all())


def test_doubling_the_range_loses_no_count() -> None:
    observer = HistogramObserver(QuantizerSpec(4), bins=8)
    for x in (torch.linspace(0, 1, 80), torch.full((5,), 3.0), torch.full((7,), -9.0)):
        observer(x)
    edges, counts = observer.histogram()
    assert (edges[0].item(), edges[-1].item()) == (-12.0, 4.0)
    assert counts.tolist() == [0, 7, 0, 0, 0, 0, 80, 5]


@settings(max_examples=15)
@given(spec=static_specs(), seed=st.integers(0, 99))
def test_histogram_bounds_are_as_good_as_those_of_the_whole_sample(spec: QuantizerSpec, seed: int) -> None:
    x = torch.randn(6000, generator=torch.Generator().manual_seed(seed)).view(-1, 1)
    errors = []
    for name in ("histogram", "mse"):
        lo, hi = observed(name, list(x.split(1500)), spec, reservoir_rows=6000).bounds()
        errors.append((fake_quantize(x, lo, hi, spec.bits) - x).square().mean())
    assert errors[0] <= errors[1] * 1.03


def test_histogram_takes_a_scalar_scale_and_refuses_a_vector() -> None:
    x = torch.randn(500, 4)
    observer = observed("histogram", [x])
    halved = [b.item() for b in observer.bounds(torch.tensor(2.0))]
    assert halved == pytest.approx([b.item() / 2 for b in observer.bounds()], rel=1e-4)
    with pytest.raises(CalibrationError, match="mse observer"):
        observer.bounds(torch.ones(4))


def test_histogram_sample_has_the_quantiles_of_the_stream() -> None:
    x = torch.randn(20000, 1)
    sample = observed("histogram", [x]).sample()
    q = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
    torch.testing.assert_close(sample.quantile(q), x.quantile(q), atol=0.01, rtol=0.01)


def test_qparams_are_step_and_lower_bound() -> None:
    observer = observed("minmax", [torch.tensor([[-1.0, 2.0]])], QuantizerSpec(2))
    step, lo = observer.calculate_qparams()
    assert (step.item(), lo.item()) == (1.0, -1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_streams_give_float32_statistics(dtype: torch.dtype) -> None:
    observer = observed("mse", [torch.randn(20, 4).to(dtype)])
    assert {t.dtype for t in (*observer.value_range(), observer.sample(), *observer.bounds())} == {torch.float32}


def test_statistics_hold_no_graph_and_stay_out_of_the_state_dict() -> None:
    observer = observed("mse", [torch.randn(20, 4, requires_grad=True)])
    assert not observer.sample().requires_grad
    assert observer.state_dict() == {}


def test_a_copied_observer_goes_on_independently_and_identically() -> None:
    first, second = torch.randn(2, 300, 4).unbind()
    observer = observed("mse", [first], reservoir_rows=16)
    twin = copy.deepcopy(observer)
    observer(second)
    assert not torch.equal(observer.sample(), twin.sample())
    twin(second)
    assert torch.equal(observer.sample(), twin.sample())


def test_the_base_class_leaves_bounds_to_its_subclasses() -> None:
    assert {issubclass(kind, OperandObserver) for kind in OBSERVERS.values()} == {True}
    assert OBSERVERS["minmax"] is MinMaxObserver
    with pytest.raises(NotImplementedError):
        OperandObserver(QuantizerSpec(4)).bounds()
