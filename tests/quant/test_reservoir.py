"""The random sample of a stream: uniform, bounded, reproducible."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.quant.reservoir import Reservoir

CPU = torch.device("cpu")


def sample_of_stream(capacity: int, batches: list[Tensor], seed: int, item_shape: tuple[int, ...] = ()) -> Tensor:
    reservoir = Reservoir(capacity, item_shape, seed=seed, device=CPU)
    for batch in batches:
        reservoir.add(batch)
    return reservoir.items()


@given(capacity=st.integers(1, 40), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_holds_distinct_items_of_the_stream_up_to_its_capacity(capacity: int, sizes: list[int], seed: int) -> None:
    stream = torch.arange(sum(sizes), dtype=torch.float32)
    sample = sample_of_stream(capacity, list(stream.split(sizes)), seed)
    assert len(sample) == min(capacity, len(stream))
    assert sample.unique().numel() == len(sample)
    assert bool(torch.isin(sample, stream).all())


@pytest.mark.parametrize("sizes", [[60], [10] * 6, [1] * 60, [3, 40, 2, 15], [50, 10], [8, 52]])
def test_every_item_is_equally_likely(sizes: list[int]) -> None:
    """Chi-square test of how often each of 60 items is kept, 12 at a time, over many seeds."""
    trials = 3000 if len(sizes) < 60 else 500
    capacity, total = 12, sum(sizes)
    batches = list(torch.arange(total, dtype=torch.float32).split(sizes))
    hits = torch.zeros(total)
    for seed in range(trials):
        hits[sample_of_stream(capacity, batches, seed).long()] += 1
    expected = trials * capacity / total
    # Items compete for a fixed number of places, which lowers the variance of each count by (1 - capacity / total).
    statistic = float(((hits - expected) ** 2).sum() / expected / (1 - capacity / total))
    degrees = total - 1
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


def test_pairs_of_items_are_equally_likely() -> None:
    """A sample could be uniform item by item and yet favour neighbours; count pairs within a batch and across."""
    trials, capacity = 4000, 4
    batches = list(torch.arange(12, dtype=torch.float32).split([7, 5]))
    together = torch.zeros(12, 12)
    for seed in range(trials):
        kept = torch.zeros(12)
        kept[sample_of_stream(capacity, batches, seed).long()] = 1
        together += kept[:, None] * kept
    pairs = together[torch.triu_indices(12, 12, 1).unbind()]
    expected = trials * (capacity * (capacity - 1)) / (12 * 11)
    assert float((pairs - expected).abs().max()) < 5 * math.sqrt(expected)


def test_rows_are_kept_whole() -> None:
    stream = torch.arange(300, dtype=torch.float32).view(100, 3)
    sample = sample_of_stream(20, list(stream.split(30)), 0, (3,))
    assert sample.shape == (20, 3)
    assert torch.equal(sample[:, 1] - sample[:, 0], torch.ones(20))
    assert bool((sample[:, 0] % 3 == 0).all())


def test_items_are_found_in_permuted_and_strided_tensors() -> None:
    stream = torch.arange(240, dtype=torch.float32).view(4, 10, 6)
    rows = stream.movedim(1, -1)
    sample = sample_of_stream(7, [rows], 3, (10,))
    expected = {tuple(row.tolist()) for row in rows.reshape(-1, 10)}
    assert {tuple(row.tolist()) for row in sample} <= expected
    values = sample_of_stream(50, [rows[:, ::2]], 3)
    assert bool(torch.isin(values, rows[:, ::2]).all())


def test_equal_seeds_give_equal_samples_and_leave_the_global_state_alone() -> None:
    batches = list(torch.randn(1000).split(100))
    before = torch.get_rng_state()
    assert torch.equal(sample_of_stream(64, batches, 5), sample_of_stream(64, batches, 5))
    assert not torch.equal(sample_of_stream(64, batches, 5), sample_of_stream(64, batches, 6))
    assert torch.equal(torch.get_rng_state(), before)


def test_flattened_rows_go_on_as_single_values() -> None:
    reservoir = Reservoir(50, (4,), seed=0, device=CPU)
    reservoir.add(torch.zeros(30, 4))
    complete = reservoir.flattened(500)
    assert complete.capacity == 500
    assert len(complete.items()) == 120
    reservoir.add(torch.zeros(70, 4))
    partial = reservoir.flattened(500)
    assert partial.capacity == len(partial.items()) == 200
    partial.add(torch.ones(400))
    assert 60 < int(partial.items().sum()) < 140


def test_streams_longer_than_numpy_counts_are_sampled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of the second half take half of the places, as they do below that length."""
    monkeypatch.setattr("harmoq_ao.quant.reservoir._LARGEST_POPULATION", 100)
    halves = [torch.zeros(20_000), torch.ones(20_000)]
    counts = [float(sample_of_stream(400, halves, seed).sum()) for seed in range(200)]
    assert abs(sum(counts) / 200 - 200) < 4 * 10 / math.sqrt(200)
    assert len(sample_of_stream(400, [torch.zeros(1000), torch.ones(1)], 0)) == 400


def test_a_stream_suddenly_longer_than_numpy_counts_fills_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the held items are fewer than the places, at least the rest comes from the new batch."""
    monkeypatch.setattr("harmoq_ao.quant.reservoir._LARGEST_POPULATION", 100)
    for seed in range(50):
        sample = sample_of_stream(100, [torch.arange(90.0), torch.arange(90.0, 102.0)], seed)
        assert sample.unique().numel() == 100
