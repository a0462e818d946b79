"""Whatever a loader is handed, it returns something valid or raises an error of ours, and runs nothing it was given.

`HARMOQ_FUZZ_SEED` chooses other cases, `HARMOQ_FUZZ_FACTOR` multiplies their number.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import find
from hypothesis import strategies as st

import harmoq_ao as h
from harmoq_ao.cli.quantize import parse_rule
from harmoq_ao.common.errors import HarmoqError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.images import ImageRecord, image_size, load_image
from harmoq_ao.runtime.upscaler import open_float
from harmoq_ao.zoo import LoadedModel
from tests.fuzz.checkpoints import BOMB_BESIDE_WEIGHTS, CHECKPOINTS, MARK
from tests.fuzz.configs import CONFIGS, RULES
from tests.fuzz.damage import FileCase, run_cases
from tests.fuzz.images import IMAGES
from tests.fuzz.saved_models import Folder, saved_models
from tests.models import build, converted

Case = TypeVar("Case")
Loaded = TypeVar("Loaded")


@pytest.fixture(autouse=True)
def _nothing_runs() -> Any:
    os.environ.pop(MARK, None)
    yield
    assert MARK not in os.environ, "a payload was executed"


def survive(
    strategy: st.SearchStrategy[Case], count: int, load: Callable[[Case], Loaded], check: Callable[[Loaded], None]
) -> None:
    """Each of many cases loads as something valid, or is refused by an error of ours; both happen."""
    outcomes: Counter[str] = Counter()

    def run(case: Case) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(load(case))
            outcomes["valid"] += 1
        except HarmoqError:
            outcomes["refused"] += 1
        assert MARK not in os.environ, "a payload was executed"

    run_cases(strategy, count, run)
    assert min(outcomes["valid"], outcomes["refused"]) >= 10, outcomes
    assert outcomes.total() >= count, outcomes


def test_the_corpus_is_always_the_same() -> None:
    runs: list[list[bytes]] = [[], []]
    for seen in runs:
        run_cases(IMAGES, 60, lambda case, seen=seen: seen.append(case.data))  # type: ignore[misc]
    assert runs[0] == runs[1]


def test_bombs_go_off_where_they_are_let(tmp_path: Path) -> None:
    path = find(BOMB_BESIDE_WEIGHTS, lambda _: True).write(tmp_path, "bomb")
    torch.load(path, weights_only=False)
    assert os.environ.pop(MARK) == "1"


def test_images(tmp_path: Path) -> None:
    def load(case: FileCase) -> ImageRecord:
        path = case.write(tmp_path, "image")
        try:
            record = load_image(path)
            assert sorted(image_size(path)) == sorted(record.size)
            return record
        finally:
            path.unlink()

    def check(record: ImageRecord) -> None:
        assert record.pixels.shape[0] == 3
        assert bool(torch.isfinite(record.pixels).all())
        assert 0.0 <= float(record.pixels.min()) <= float(record.pixels.max()) <= 1.0

    survive(IMAGES, 1400, load, check)


def test_checkpoints(tmp_path: Path) -> None:
    def load(case: FileCase) -> LoadedModel:
        path = case.write(tmp_path, "model")
        try:
            return open_float(path)
        finally:
            path.unlink()

    def check(loaded: LoadedModel) -> None:
        assert all(bool(torch.isfinite(p).all()) for p in loaded.model.parameters())

    survive(CHECKPOINTS, 400, load, check)


def _prepare_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the network once for each configuration and examples' shapes; hundreds of cases share the intact ones."""
    traced: dict[str, h.PreparedModel] = {}

    def prepare(model: torch.nn.Module, config: HarmoqConfig, examples: list[torch.Tensor]) -> h.PreparedModel:
        key = f"{config.to_dict()}, {[tuple(example.shape) for example in examples]}"
        if key not in traced:
            traced[key] = h.prepare_harmoq(model, config, examples)
        return copy.deepcopy(traced[key])

    monkeypatch.setattr("harmoq_ao.conversion.load.prepare_harmoq", prepare)


def test_saved_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare_once(monkeypatch)
    source = h.save_quantized(converted("linears", HarmoqConfig(4, 4)), tmp_path / "source")
    weights = next(source.glob("*.safetensors"))
    folder = Folder((source / "config.json").read_bytes(), weights.read_bytes())
    skeleton = build("linears")
    target = tmp_path / "changed"
    target.mkdir()

    def load(changed: Folder) -> h.QuantizedModel:
        (target / "config.json").write_bytes(changed.config)
        (target / weights.name).write_bytes(changed.weights)
        return h.load_quantized(target, model=skeleton)

    def check(model: h.QuantizedModel) -> None:
        with torch.no_grad():
            assert bool(torch.isfinite(model(torch.rand(1, 3, 8, 8))).all())

    survive(saved_models(folder), 300, load, check)


def test_configs() -> None:
    def check(config: HarmoqConfig) -> None:
        for kind in ("linear", "matmul", "conv2d"):
            config.settings("a.qkv", kind)
        assert HarmoqConfig.from_dict(config.to_dict()) == config

    survive(CONFIGS, 500, HarmoqConfig.from_dict, check)


def test_rules() -> None:
    def check(rule: SiteRule) -> None:
        rule.matches("layers.0.attn.qkv", "linear")
        HarmoqConfig(rules=[rule]).settings("a.qkv", "linear")

    survive(RULES, 200, parse_rule, check)
