"""What a saved model says of its sites: with it a load runs nothing; without it, or with other source, it prepares."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import harmoq_ao as h
from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.format import OLDEST_VERSION, canonical_json, seal
from harmoq_ao.conversion.found_format import Description, description_of
from harmoq_ao.sites.site import FloatCause, FloatReason, FloatSite
from tests.conversion.helpers import CONFIG, SMALL
from tests.models import build, converted, entry, images, run

PAPER8 = HarmoqConfig(8, 8, "paper", conv_bits=8)


def _without_runs(patch: pytest.MonkeyPatch) -> None:
    """Make every run of a network an error, and every preparation."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a load ran the network")

    for cls in (nn.Conv2d, nn.LayerNorm, nn.Linear):
        patch.setattr(cls, "forward", fail)
    patch.setattr("harmoq_ao.conversion.load.prepare_harmoq", fail)


def _prepared_anew(patch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that loads prepare by running them."""
    seen: list[nn.Module] = []

    def prepare(model: nn.Module, *args: Any) -> h.PreparedModel:
        seen.append(model)
        return h.prepare_harmoq(model, *args)

    patch.setattr("harmoq_ao.conversion.load.prepare_harmoq", prepare)
    return seen


def _change(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256")
    change(config)
    (folder / "config.json").write_bytes(canonical_json(seal(config)))


@pytest.mark.parametrize("name", ["SwinIR/light", "FDAT", "DAT/light"])
def test_a_load_runs_nothing_and_computes_the_same_bits_at_every_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(name, CONFIG)
    h.save_quantized(model, tmp_path / "m")
    with monkeypatch.context() as patch:
        _without_runs(patch)
        loaded = h.load_quantized(tmp_path / "m")
    for size in entry(name).sizes:
        image = images(1, size, seed=5)[0]
        assert torch.equal(run(loaded, image), run(model, image))


@pytest.mark.parametrize("config", [CONFIG, PAPER8, HarmoqConfig(4, 32), HarmoqConfig(32, 4)])
def test_a_module_of_ones_own_is_not_run_either(
    config: HarmoqConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted("forms", config)
    h.save_quantized(model, tmp_path / "m")
    with monkeypatch.context() as patch:
        _without_runs(patch)
        loaded = h.load_quantized(tmp_path / "m", build("forms"))
    for size in ((16, 16), (16, 24), (32, 8)):
        image = images(1, size, seed=5)[0]
        assert torch.equal(run(loaded, image), run(model, image))
    assert loaded.report() == model.report()


def test_another_type_of_the_floats_is_set_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(SMALL, HarmoqConfig(8, 8))
    loaded = h.load_quantized(h.save_quantized(model, tmp_path / "m"))
    with monkeypatch.context() as patch:
        _without_runs(patch)
        loaded.set_float_dtype(torch.bfloat16)
    assert torch.equal(run(loaded), run(model.set_float_dtype(torch.bfloat16)))


def test_the_description_survives_and_shares_what_is_equal() -> None:
    description = description_of(converted(SMALL, CONFIG))
    data = json.loads(json.dumps(description.to_dict()))
    assert Description.from_dict(data) == description
    assert len(data["plans"]) < len(data["islands"])
    assert len(data["reasons"]) < len(description.found.floats)


def test_entries_of_blocks_that_are_alike_are_written_once() -> None:
    description = description_of(converted("DAT/light", CONFIG))
    data = description.to_dict()
    assert Description.from_dict(data) == description
    assert len(data["floats"]) < len(description.found.floats) * 2 / 3
    assert len(data["sites"]) == len(description.found.sites), "each has a ratio of its own"


@given(names=st.lists(st.sampled_from(["a.0.x", "a.1.x", "a.1.y", "b"]), max_size=60), period=st.integers(1, 9))
def test_any_list_with_repetitions_survives(names: list[str], period: int) -> None:
    reason = FloatReason(FloatCause.SETTINGS, "asked for")
    floats = tuple(FloatSite(name, "conv2d", reason, 7) for name in (names[:period] * 9 + names)[:200])
    description = description_of(converted("linears", CONFIG))
    description = replace(description, found=replace(description.found, floats=floats))
    assert Description.from_dict(json.loads(json.dumps(description.to_dict()))) == description


def _written_out(data: dict[str, Any]) -> None:
    """What a description of version 4 is: all entries."""
    for field in ("sites", "floats", "islands"):
        rows: list[Any] = []
        for row in data[field]:
            if len(row) > 2:
                rows.append(row)
            else:
                rows.extend(islice(cycle(rows[len(rows) - row[0] :]), row[1]))
        data[field] = rows


def test_a_folder_of_version_4_loads_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("DAT/light", CONFIG)
    folder = h.save_quantized(model, tmp_path / "m")

    def older(config: dict[str, Any]) -> None:
        config["schema_version"] = 4
        _written_out(config["found"])
        assert len(config["found"]["floats"]) == sum(not row.quantized for row in model.rows)

    _change(folder, older)
    with monkeypatch.context() as patch:
        _without_runs(patch)
        loaded = h.load_quantized(folder)
    assert torch.equal(run(loaded), run(model))


def test_a_folder_of_the_older_version_is_prepared_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(SMALL, CONFIG)
    folder = h.save_quantized(model, tmp_path / "m")

    def older(config: dict[str, Any]) -> None:
        config["schema_version"] = OLDEST_VERSION
        config["sqnr_db"] = Description.from_dict(config.pop("found")).sqnr_db

    _change(folder, older)
    seen = _prepared_anew(monkeypatch)
    loaded = h.load_quantized(folder)
    assert len(seen) == 1
    assert torch.equal(run(loaded), run(model))
    assert loaded.report() == model.report()
    again = h.load_quantized(h.save_quantized(loaded, tmp_path / "again"))
    assert len(seen) == 1, "a folder that was saved again is of the new version"
    assert torch.equal(run(again), run(model))


# --- other source -----------------------------------------------------------------------------------------------------

_SOURCE = """
import torch
from torch import nn


class Author(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(3, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, image):
        q, k, v = self.qkv(image.flatten(2).transpose(1, 2)).chunk(3, -1){}
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.out(y).transpose(1, 2).reshape(image.shape)
"""


def _author(path: Path, source: str) -> ModuleType:
    """A module of an author, imported from a file of this text."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_other_source_of_the_author_is_prepared_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    before = _author(tmp_path / "author_before.py", _SOURCE.format(""))
    model = h.convert_harmoq(
        h.calibrate(h.prepare_harmoq(before.Author(), CONFIG, images(1, (8, 8))), images(2, (8, 8)))
    )
    folder = h.save_quantized(model, tmp_path / "m")
    seen = _prepared_anew(monkeypatch)
    assert torch.equal(run(h.load_quantized(folder, before.Author())), run(model))
    assert not seen
    later = _author(tmp_path / "author_later.py", _SOURCE.format("\n        # one line more, which moves the products"))
    assert torch.equal(run(h.load_quantized(folder, later.Author())), run(model))
    assert len(seen) == 1


def test_contractions_in_torchs_own_source_are_found_anew_with_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.first(image.flatten(2).transpose(1, 2))
            y: torch.Tensor = self.last(self.attention(x, x + 1, x, need_weights=False)[0])
            return y.transpose(1, 2).reshape(image.shape)

    model = h.convert_harmoq(h.calibrate(h.prepare_harmoq(Attention(), CONFIG, images(1, (8, 8))), images(2, (8, 8))))
    folder = h.save_quantized(model, tmp_path / "m")
    seen = _prepared_anew(monkeypatch)
    assert torch.equal(run(h.load_quantized(folder, Attention())), run(model))
    assert not seen
    _change(folder, lambda config: config["found"].update(torch="1.0"))
    assert torch.equal(run(h.load_quantized(folder, Attention())), run(model))
    assert len(seen) == 1


# --- checks -----------------------------------------------------------------------------------------------------------


def test_verify_prepares_and_agrees_with_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(SMALL, CONFIG)
    h.save_quantized(model, tmp_path / "m")
    seen = _prepared_anew(monkeypatch)
    assert torch.equal(run(h.load_quantized(tmp_path / "m", verify=True)), run(model))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sites", lambda sites: sites[0].__setitem__(2, 1)),  # multiply-accumulates
        ("floats", lambda floats: floats.pop()),
        ("plans", lambda plans: plans[0][0].__setitem__(3, 7)),  # another line of the source
    ],
)
def test_verify_refuses_what_preparing_does_not_find(field: str, change: Callable[[Any], Any], folder: Path) -> None:
    _change(folder, lambda config: change(config["found"][field]))
    h.load_quantized(folder)
    with pytest.raises(SavedModelError, match=field):
        h.load_quantized(folder, verify=True)


def test_verify_refuses_examples_that_the_model_does_not_take(folder: Path) -> None:
    _change(folder, lambda config: config.update(example_shapes=[[1, 7, 16, 16]]))
    with pytest.raises(SavedModelError):
        h.load_quantized(folder, verify=True)


def test_a_model_that_would_not_compute_the_same_is_not_saved(tmp_path: Path) -> None:
    model = converted(SMALL, CONFIG)
    model.model.img_range = 3.0  # which its constructor knows nothing of
    with pytest.raises(SavedModelError, match="not compute the same"):
        h.save_quantized(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


class Branch(nn.Module):
    """A product among channels, and for wide images a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 6)
        self.back = nn.Linear(6, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.proj(image.flatten(2).transpose(1, 2))
        tokens = tokens @ (tokens.transpose(1, 2) @ tokens).softmax(-1)
        if image.shape[-1] > 16:
            tokens = tokens @ (tokens.transpose(1, 2) @ tokens).softmax(-1)
        result: torch.Tensor = self.back(tokens).transpose(1, 2).reshape(image.shape)
        return result


def test_a_site_met_after_preparation_is_not_saved_and_is_met_again(tmp_path: Path) -> None:
    sizes = [(8, 8), (8, 16)]
    prepared = h.prepare_harmoq(Branch(), CONFIG, [images(1, size)[0] for size in sizes])
    model = h.convert_harmoq(h.calibrate(prepared, images(2, (8, 8))))
    wide = images(1, (8, 24))[0]
    expected = run(model, wide)  # meets two products, too late to be calibrated: they stay float
    loaded = h.load_quantized(h.save_quantized(model, tmp_path / "m"), Branch())
    assert torch.equal(run(loaded, wide), expected)
    assert torch.equal(run(loaded, images(1, (8, 8))[0]), run(model, images(1, (8, 8))[0]))
    assert set(loaded.sites()) == set(model.sites())
