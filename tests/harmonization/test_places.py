"""Places of gradient steps: drawn in proportion to what the float network adds there, one from each stratum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.harmonization import refine as refinement
from harmoq_ao.harmonization.places import Places, added_detail
from harmoq_ao.harmonization.settings import RefineSettings
from harmoq_ao.harmonization.teacher import Teacher
from tests.harmonization.helpers import crops
from tests.models import calibrated

W3A3 = h.HarmoqConfig(3, 3, profile="paper")


def numbered(count: int, height: int, width: int) -> list[Tensor]:
    """Crops whose pixels are all different numbers."""
    return list(torch.arange(count * height * width * 1.0).reshape(count, 1, height, width))


def counts(places: Places, crops: list[Tensor], steps: int, of: int) -> Tensor:
    """How often each crop was drawn."""
    found = torch.zeros(len(crops))
    size = crops[0].numel()
    for step in range(steps):
        for image in places.draw(step, of):
            found[int(image.flatten()[0]) // size] += 1
    return found


@given(st.integers(1, 7), st.integers(3, 9), st.integers(3, 9), st.integers(1, 10), st.integers(0, 99))
def test_every_place_has_a_number(count: int, height: int, width: int, side: int, seed: int) -> None:
    images = numbered(count, height, width)
    places = Places(images, torch.ones(count, height, width), side, 1.0, seed)
    all_places = [places.at(place) for place in range(len(places.cumulative))]
    assert {tuple(part.shape) for part in all_places} == {(1, min(side, height), min(side, width))}
    assert len({float(part.flatten()[0]) for part in all_places}) == len(all_places)
    known = {tuple(sorted(part.flatten().tolist())) for part in all_places}
    assert all(tuple(sorted(part.flatten().tolist())) in known for part in places.draw(seed, 5))


@given(st.integers(1, 9), st.integers(0, 2**20), st.floats(0, 2))
def test_a_step_of_as_many_images_as_equal_crops_sees_each_once(count: int, step: int, focus: float) -> None:
    images = numbered(count, 4, 4)
    places = Places(images, torch.full((count, 4, 4), 0.3), 2, focus, 1)
    assert sorted(int(part.flatten()[0]) // 16 for part in places.draw(step, count)) == list(range(count))


def test_places_are_drawn_in_proportion_to_the_power_of_their_worth() -> None:
    images = numbered(3, 4, 4)
    worth = torch.tensor([1.0, 2.0, 4.0])[:, None, None].expand(3, 4, 4)
    for focus in (0.0, 1.0, 2.0):
        found = counts(Places(images, worth, 2, focus, 0), images, 1000, 7)
        shares = torch.tensor([1.0, 2.0, 4.0]) ** focus
        assert (found / found.sum() - shares / shares.sum()).abs().max() < 0.01


@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**20))
def test_nothing_is_drawn_that_is_worth_nothing(index: int, top: int, left: int, step: int) -> None:
    images = numbered(6, 4, 4)
    worth = torch.zeros(6, 4, 4)
    worth[index, top, left] = 1e-9
    for image in Places(images, worth, 1, 1.0, 0).draw(step, 4):
        assert float(image) == 16 * index + 4 * top + left


def test_equal_and_worthless_places_are_drawn_alike() -> None:
    images = numbered(3, 4, 4)
    nothing, same = (Places(images, worth, 2, 1.0, 5) for worth in (torch.zeros(3, 4, 4), torch.ones(3, 4, 4)))
    assert all(torch.equal(a, b) for a, b in zip(nothing.draw(3, 4), same.draw(3, 4), strict=True))


def test_draws_are_seeded_and_turned_all_ways() -> None:
    images = numbered(1, 3, 3)
    first, again, other = (Places(images, torch.ones(1, 3, 3), None, 1.0, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.draw(4, 6), again.draw(4, 6), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.draw(4, 6), other.draw(4, 6), strict=True))
    assert len({tuple(image.flatten().tolist()) for step in range(40) for image in first.draw(step, 2)}) == 8


def test_added_detail_is_the_difference_to_interpolation() -> None:
    prepared = calibrated("SwinIR/light", W3A3)
    teacher = Teacher(prepared)
    image = crops(1)[0]
    with torch.no_grad():
        output = teacher.exact.image(image[None])
    scale = output.shape[-1] // image.shape[-1]
    bicubic = F.interpolate(image[None], scale_factor=scale, mode="bicubic")
    expected = F.avg_pool2d((output - bicubic).square().mean(1), scale)
    torch.testing.assert_close(added_detail(teacher.quick, [image]), expected, rtol=1e-3, atol=1e-6)


def test_what_the_network_does_not_take_is_worth_nothing() -> None:
    prepared = calibrated("SwinIR/light", W3A3)
    prepared.traits = replace(prepared.traits, size_multiple=8, square=True)
    found = added_detail(Teacher(prepared).quick, [torch.rand(3, 19, 25)])
    assert found.shape == (1, 19, 25)
    assert (found[:, :16, :16] > 0).all()
    assert found.sum() == found[:, :16, :16].sum()


def test_crops_shorter_than_the_network_asks_for_are_weighed_whole() -> None:
    prepared, images = calibrated("SwinIR/light", W3A3), [torch.rand(3, 16, 24)]
    whole = added_detail(Teacher(prepared).quick, images)
    prepared.traits = replace(prepared.traits, size_multiple=32)
    assert torch.equal(added_detail(Teacher(prepared).quick, images), whole)


@pytest.mark.parametrize(("focus", "side"), [(1.0, 8), (0.0, 8), (1.0, None)])
def test_refinement_learns_from_such_places(focus: float, side: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Places] = []
    drawn = Places.draw

    def draw(self: Places, step: int, count: int) -> list[Tensor]:
        seen.append(self)
        return drawn(self, step, count)

    monkeypatch.setattr(Places, "draw", draw)
    prepared, images = calibrated("SwinIR/light", W3A3), crops(2)
    worth = added_detail(Teacher(prepared).quick, images) if focus else torch.ones(2, *images[0].shape[1:])
    refinement.refine(prepared, images, RefineSettings(steps=1, batch_size=2, crop_size=side, focus=focus, checks=1))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].cumulative, Places(images, worth, side, focus, 0).cumulative)
