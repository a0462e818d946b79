"""Forged models, sealed again as somebody who means harm would: refused, and nothing in them is run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.common.errors import HarmoqError, SavedModelError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.format import OLDEST_VERSION, SCHEMA_VERSION, canonical_json
from tests.conversion.helpers import CONFIG, SMALL, tensors_of, weights_of
from tests.models import build, converted, run


def _forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256")
    config = change(config) or config
    digest = hashlib.sha256(canonical_json(config)).hexdigest()
    (folder / "config.json").write_text(json.dumps({**config, "sha256": digest}))


def _put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that puts a value, or what a function makes of the present one, at a dotted path."""

    def change(config: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for key in outer:
            config = config[key]
        config[last] = value(config[last]) if callable(value) else value

    return change


def _first(change: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    """A list whose first entry is changed."""
    return lambda entries: [change(entries[0]), *entries[1:]]


def _entry(at: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    """A list whose first entry has another member."""
    return _first(lambda entry: [*entry[:at], value, *entry[at + 1 :]])


def _fact(name: str, value: Any) -> Callable[[list[Any]], list[Any]]:
    """Plans of which the first contraction's site has another fact."""
    return _first(_first(lambda spot: [*spot[:5], {**spot[5], name: value}]))


def _ratio(value: Any) -> Callable[[list[Any]], list[Any]]:
    """Sites whose quantized ones have another SQNR."""
    return lambda sites: [[*site[:3], *([value] if len(site) > 3 else [])] for site in sites]


HUGE = "9" * 5000
SIZES = ([1, 3, 16], [1, 3, 0, 16], [1, 3, -16, -16], [1, 3, 10**9, 10**9], [1, 3, 16.0, 16])
PAPER = {"act_bits": 4, "profile": "paper"}
FORGED_VALUES: dict[str, list[Any]] = {
    "format": ["other"],
    "schema_version": [SCHEMA_VERSION + 1, OLDEST_VERSION - 1, OLDEST_VERSION, None, "1", True],
    "traits": [{}],
    "traits.scale": [-1, 2.5],
    "traits.extra": [1],
    "traits.architecture": [None, []],
    "traits.architecture.class": [
        "os:system",
        "spandrel.architectures.SwinIR:Nothing",
        "torch.nn.modules.linear:Linear",
        ["os"],
    ],
    "traits.architecture.hyperparameters": [None],
    "traits.architecture.hyperparameters.embed_dim": [10**9, -12, 24, "12"],
    "traits.architecture.hyperparameters.window_size": [0],
    "traits.architecture.hyperparameters.depths": [[2, 2] * 5000, [2]],
    "traits.architecture.hyperparameters.upscale": [3],
    "traits.architecture.hyperparameters.no_such": [3],
    "example_shapes": [[], *([size] for size in SIZES), [[True, 3, 16, 16]], [[1, 3, 16, 16]] * 100],
    "quantization_config": [{"weight_bits": 1}, {"weight_bits": 8, **PAPER}, {"weight_bits": 3, **PAPER}],
    "quantization_config.matmul_bits": [32],
    "quantization_config.joint_scale": ["none"],
    "quantization_config.conv_bits": [8],
    "quantization_config.rules": [[{"sites": "nowhere"}], [{"sites": ["*"]}]],
    "quantization_config.__class__": ["x"],
    "float_dtype": ["float64", ["float32"]],
    "found": [[], {}, None],
    "found.x": [1.0],
    "found.fingerprint": ["", "0", 3, "g" * 64, ["0" * 64]],
    "found.torch": [2, HUGE],
    "found.sites": [
        *([], {}, [[]], [[0, "elsewhere", 3]], lambda sites: sites[1:], lambda sites: [*sites, sites[0]]),
        *(_entry(0, 99), _entry(0, -1), _entry(1, "elsewhere"), _entry(1, HUGE), _entry(1, None)),
        *(_entry(2, -1), _entry(2, 10**400), _entry(2, 1.0), _first(lambda site: site[:2])),
        *map(_ratio, (float("nan"), 10**400, True, "1")),
    ],
    "found.floats": [
        *(None, _entry(3, 10**6), _entry(3, -1), _entry(2, "x"), _entry(0, 5)),
        *(lambda floats, run=run: [floats[0], run] for run in ([2, 1], [-1, 1], [1, 10**6], [1, -1], [1, 0.5], [1])),
    ],
    "found.reasons": [None, [], _entry(1, "because"), _entry(2, 7), _entry(0, None)],
    "found.islands": [
        [],
        _entry(2, 99),
        _entry(1, "elsewhere"),
        _entry(1, ""),
        lambda islands: [*islands, islands[-1]],
    ],
    "found.plans": [
        *([], None, _first(lambda plan: [])),
        *(
            _first(_entry(at, value))
            for at, value in ((0, "conv2d"), (0, "os"), (1, -1), (1, 7), (2, 3), (3, -1), (4, 0.5))
        ),
        *(_fact("shape", shape) for shape in ([], [1, 2, 3], [-1], [10**12], "x", None, [True])),
        *(
            _fact(*fact)
            for fact in (
                *(("role", "none"), ("equation", "ij,jk->ik"), ("weight", 3), ("x", 1), ("location", 5)),
                *(("unit_length", True), ("unit_length", 1)),
            )
        ),
    ],
    "found.mlps": [None, [["", "x", "y", "erf"]], [["layers", "0", "1", "erf"]], [[1, 2, 3, 4]], [["a", "b"]]],
    "found.kept": [None, ["elsewhere"], [3], [""]],
    "weights": [None],
    "weights.file": [
        *("../x", "/etc/passwd", "config.json", "model-0123456789ab.safetensors", "n" * 5000, "\0", "", ".."),
    ],
    "weights.sha256": ["0" * 64],
    "weights.layout": [
        *("", "hhh", lambda layout: "x" * len(layout), lambda layout: "h" * len(layout)),
        *(lambda layout: "-" * len(layout), lambda layout: layout[::-1]),
    ],
}
FORGERIES = [_put(path, value) for path, values in FORGED_VALUES.items() for value in values]


@pytest.mark.parametrize("change", FORGERIES)
def test_a_forged_config_is_refused(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    _forge(folder, change)
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


FIELDS = ["quantization_config", "float_dtype", "traits", "example_shapes", "found", "weights"]


@pytest.mark.parametrize("key", FIELDS)
def test_a_missing_field_is_named(key: str, folder: Path) -> None:
    _forge(folder, lambda config: {k: v for k, v in config.items() if k != key})
    with pytest.raises(SavedModelError, match=key):
        h.load_quantized(folder)


def test_resealing_alone_is_no_damage(folder: Path) -> None:
    _forge(folder, lambda config: None)
    assert torch.equal(run(h.load_quantized(folder)), run(converted(SMALL, CONFIG)))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_in_the_config_gives_a_model_or_a_typed_error(
    data: st.DataObject, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True))
    junk = st.one_of(st.none(), st.booleans(), st.integers(-9, 300), st.floats(), st.text(max_size=5), st.just([]))

    def change(config: dict[str, Any]) -> None:
        here: Any = config
        while True:
            key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            if not (isinstance(here[key], (dict, list)) and here[key] and data.draw(st.booleans())):
                here[key] = data.draw(junk)
                return
            here = here[key]

    _forge(folder, change)
    with contextlib.suppress(SavedModelError):
        assert isinstance(h.load_quantized(folder), h.QuantizedModel)


def _forge_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    _replace_weights(folder, save(tensors))


def _replace_weights(folder: Path, data: bytes) -> None:
    weights_of(folder).write_bytes(data)
    _forge(folder, _put("weights.sha256", hashlib.sha256(data).hexdigest()))


def _codes(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith(".codes"))


def _fill(value: float, letter: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[f"floats.{letter}"].fill_(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clear(),
        lambda t: t.pop(_codes(t)),
        lambda t: t.update({_codes(t): t[_codes(t)][:1].clone()}),
        lambda t: t.update({_codes(t): t[_codes(t)].to(torch.int64)}),
        lambda t: t.update({_codes(t): t[_codes(t)].float()}),
        lambda t: t.update({"surplus": torch.zeros(3)}),
        lambda t: t.update({"model.weight": torch.zeros(3, dtype=torch.uint8)}),
        lambda t: t.pop("floats.float16"),
        lambda t: t.update({"floats.float16": t["floats.float16"][:-1].clone()}),
        lambda t: t.update({"floats.float16": t["floats.float16"].float()}),
        lambda t: t.update({"floats.float16": t["floats.float16"][None].clone()}),
        lambda t: t.update({"floats.float32": t["floats.float32"].repeat(2)}),
        *(_fill(value, "float16") for value in (float("nan"), float("inf"), -1.0, 0.0)),
        *(_fill(value, "float32") for value in (float("nan"), -1.0, 0.0)),
    ],
)
def test_forged_tensors_are_refused(change: Callable[[dict[str, Tensor]], Any], folder: Path) -> None:
    _forge_tensors(folder, change)
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


def test_weights_that_are_a_pickle_are_never_executed(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    torch.save({"codes": Harm()}, tmp_path / "harm")
    _replace_weights(folder, (tmp_path / "harm").read_bytes())
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)
    assert not marker.exists()


def test_packed_codes_with_set_padding_bits_are_refused(tmp_path: Path) -> None:
    model = converted("linears", HarmoqConfig(3, 3))
    folder = h.save_quantized(model, tmp_path / "m")
    _forge_tensors(folder, lambda tensors: tensors[_codes(tensors)].fill_(255))
    with pytest.raises(HarmoqError):
        run(h.load_quantized(folder, build("linears")))


def test_a_safetensors_file_of_another_kind_is_refused(folder: Path) -> None:
    save_file({"a": torch.zeros(3)}, weights_of(folder))
    _replace_weights(folder, weights_of(folder).read_bytes())
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)
