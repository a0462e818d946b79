"""What all observers share: exact ranges, bounded memory, reproducible samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.quant.observers import OBSERVERS, HistogramObserver, MinMaxObserver, MSEObserver, OperandObserver
from harmoq_ao.quant.quantizer import QuantizerSpec
from tests.quant.observers.helpers import NAMES, batches, observed
from tests.strategies import float_tensors, joint_scales, static_specs


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


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="room for a sample"):
        MSEObserver(QuantizerSpec(4), reservoir_rows=0)
    with pytest.raises(ConfigError, match="histogram bins"):
        HistogramObserver(QuantizerSpec(4), bins=7)


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
