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
from random import Random
from typing import Any

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.cli.quantize import parse_rule
from harmoq_ao.common.errors import HarmoqError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.conversion import serialization
from harmoq_ao.images import image_size, load_image
from harmoq_ao.runtime.upscaler import open_float
from harmoq_ao.zoo import LoadedModel
from tests.fuzz.checkpoints import CHECKPOINTS, MARK
from tests.fuzz.configs import CONFIGS, RULES
from tests.fuzz.images import IMAGES
from tests.fuzz.registry import Registry
from tests.fuzz.saved_models import SAVED_MODELS, Folder
from tests.models import build, converted

SEED = int(os.environ.get("HARMOQ_FUZZ_SEED", "0"))
FACTOR = int(os.environ.get("HARMOQ_FUZZ_FACTOR", "1"))
COUNTS = {"images": 1400, "checkpoints": 400, "saved models": 300, "configs": 500, "rules": 200}


@pytest.fixture(autouse=True)
def _nothing_runs() -> Any:
    os.environ.pop(MARK, None)
    yield
    assert MARK not in os.environ, "a payload was executed"


def survive(
    registry: Registry, kind: str, load: Callable[[str, Any], Any], check: Callable[[Any], None]
) -> Counter[str]:
    """Load all cases of a kind; every failure is collected, so that one run shows them all."""
    outcomes: Counter[str] = Counter()
    wrong = []
    for name, case in registry.cases(COUNTS[kind] * FACTOR, SEED):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(load(name, case))
            outcomes["valid"] += 1
        except HarmoqError:
            outcomes["refused"] += 1
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        assert MARK not in os.environ, f"{name} was executed"
    assert not wrong, f"{len(wrong)} untyped errors:\n" + "\n".join(wrong[:40])
    assert min(outcomes["valid"], outcomes["refused"]) >= 10, outcomes
    return outcomes


def test_the_corpus_is_large_and_always_the_same() -> None:
    assert sum(COUNTS[kind] for kind in ("images", "checkpoints", "saved models")) >= 2000
    assert COUNTS["configs"] + COUNTS["rules"] >= 500
    assert [(n, c.data) for n, c in IMAGES.cases(60)] == [(n, c.data) for n, c in IMAGES.cases(60)]


def test_bombs_go_off_where_they_are_let(tmp_path: Path) -> None:
    path = CHECKPOINTS.mutations["bomb_beside_weights"](Random(0)).write(tmp_path, "bomb")
    torch.load(path, weights_only=False)
    assert os.environ.pop(MARK) == "1"


def test_images(tmp_path: Path) -> None:
    def load(name: str, case: Any) -> Any:
        path = case.write(tmp_path, name)
        try:
            record = load_image(path)
            assert sorted(image_size(path)) == sorted(record.size)
            return record
        finally:
            path.unlink()

    def check(record: Any) -> None:
        assert record.pixels.shape[0] == 3
        assert bool(torch.isfinite(record.pixels).all())
        assert 0.0 <= float(record.pixels.min()) <= float(record.pixels.max()) <= 1.0

    survive(IMAGES, "images", load, check)


def test_checkpoints(tmp_path: Path) -> None:
    def load(name: str, case: Any) -> LoadedModel:
        path = case.write(tmp_path, name)
        try:
            return open_float(path)
        finally:
            path.unlink()

    def check(loaded: LoadedModel) -> None:
        assert all(bool(torch.isfinite(p).all()) for p in loaded.model.parameters())

    survive(CHECKPOINTS, "checkpoints", load, check)


def _prepare_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the network once for each configuration and examples' shapes; hundreds of cases share the intact ones."""
    traced: dict[str, h.PreparedModel] = {}

    def prepare(model: torch.nn.Module, config: HarmoqConfig, examples: list[torch.Tensor]) -> h.PreparedModel:
        key = f"{config.to_dict()}, {[tuple(example.shape) for example in examples]}"
        if key not in traced:
            traced[key] = h.prepare_harmoq(model, config, examples)
        return copy.deepcopy(traced[key])

    monkeypatch.setattr(serialization, "prepare_harmoq", prepare)


def test_saved_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare_once(monkeypatch)
    source = h.save_quantized(converted("linears", HarmoqConfig(4, 4)), tmp_path / "source")
    weights = next(source.glob("*.safetensors"))
    folder = Folder((source / "config.json").read_bytes(), weights.read_bytes())
    skeleton = build("linears")
    target = tmp_path / "changed"
    target.mkdir()

    def load(name: str, change: Callable[[Folder], Folder]) -> h.QuantizedModel:
        changed = change(folder)
        (target / "config.json").write_bytes(changed.config)
        (target / weights.name).write_bytes(changed.weights)
        return h.load_quantized(target, model=skeleton)

    def check(model: h.QuantizedModel) -> None:
        with torch.no_grad():
            assert bool(torch.isfinite(model(torch.rand(1, 3, 8, 8))).all())

    survive(SAVED_MODELS, "saved models", load, check)


def test_configs() -> None:
    def check(config: HarmoqConfig) -> None:
        for kind in ("linear", "matmul", "conv2d"):
            config.settings("a.qkv", kind)
        assert HarmoqConfig.from_dict(config.to_dict()) == config

    survive(CONFIGS, "configs", lambda _, data: HarmoqConfig.from_dict(data), check)


def test_rules() -> None:
    def check(rule: SiteRule) -> None:
        rule.matches("layers.0.attn.qkv", "linear")
        HarmoqConfig(rules=[rule]).settings("a.qkv", "linear")

    survive(RULES, "rules", lambda _, text: parse_rule(text), check)
