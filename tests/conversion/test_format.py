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
from harmoq_ao.conversion.format import SCHEMA_VERSION, canonical_json
from tests.conversion.helpers import CONFIG, SMALL, tensors_of, weights_of
from tests.models import build, converted, run


def _forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256")
    config = change(config) or config
    digest = hashlib.sha256(canonical_json(config)).hexdigest()
    (folder / "config.json").write_text(json.dumps({**config, "sha256": digest}))


def _put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def _rename_site(config: dict[str, Any]) -> None:
    first = next(iter(config["sqnr_db"]))
    config["sqnr_db"]["elsewhere"] = config["sqnr_db"].pop(first)


ARCHITECTURE = ("traits", "architecture")
PARAMETERS = (*ARCHITECTURE, "hyperparameters")
FORGERIES: list[Callable[[dict[str, Any]], Any]] = [
    _put("format", value="other"),
    _put("schema_version", value=SCHEMA_VERSION + 1),
    _put("schema_version", value=None),
    _put("schema_version", value="1"),
    _put(*ARCHITECTURE, "class", value="os:system"),
    _put(*ARCHITECTURE, "class", value="spandrel.architectures.SwinIR:Nothing"),
    _put(*ARCHITECTURE, "class", value="torch.nn.modules.linear:Linear"),
    _put(*ARCHITECTURE, "class", value=["os"]),
    _put(*ARCHITECTURE, value=None),
    _put(*ARCHITECTURE, value=[]),
    _put(*PARAMETERS, "embed_dim", value=10**9),
    _put(*PARAMETERS, "embed_dim", value=-12),
    _put(*PARAMETERS, "embed_dim", value=24),
    _put(*PARAMETERS, "embed_dim", value="12"),
    _put(*PARAMETERS, "window_size", value=0),
    _put(*PARAMETERS, "depths", value=[2, 2] * 5000),
    _put(*PARAMETERS, "depths", value=[2]),
    _put(*PARAMETERS, "upscale", value=3),
    _put(*PARAMETERS, "no_such", value=3),
    _put(*PARAMETERS, value=None),
    _put("traits", value={}),
    _put("traits", "scale", value=-1),
    _put("traits", "scale", value=2.5),
    _put("traits", "extra", value=1),
    _put("example_shapes", value=[]),
    _put("example_shapes", value=[[1, 3, 16]]),
    _put("example_shapes", value=[[1, 3, 0, 16]]),
    _put("example_shapes", value=[[1, 3, -16, -16]]),
    _put("example_shapes", value=[[1, 3, 10**9, 10**9]]),
    _put("example_shapes", value=[[1, 7, 16, 16]]),
    _put("example_shapes", value=[[1, 3, 16.0, 16]]),
    _put("example_shapes", value=[[True, 3, 16, 16]]),
    _put("example_shapes", value=[[1, 3, 16, 16]] * 100),
    _put("quantization_config", value={"weight_bits": 1}),
    _put("quantization_config", value={"weight_bits": 8, "act_bits": 4, "profile": "paper"}),
    _put("quantization_config", value={"weight_bits": 3, "act_bits": 4, "profile": "paper"}),
    _put("quantization_config", "matmul_bits", value=32),
    _put("quantization_config", "joint_scale", value="none"),
    _put("quantization_config", "conv_bits", value=8),
    _put("quantization_config", "rules", value=[{"sites": "nowhere"}]),
    _put("quantization_config", "rules", value=[{"sites": ["*"]}]),
    _put("quantization_config", "__class__", value="x"),
    _put("float_dtype", value="float64"),
    _put("float_dtype", value=["float32"]),
    _put("sqnr_db", value=[]),
    _put("sqnr_db", value={}),
    _put("sqnr_db", "x", value=1.0),
    _rename_site,
    lambda config: config["sqnr_db"].update(dict.fromkeys(config["sqnr_db"], float("nan"))),
    lambda config: config["sqnr_db"].update(dict.fromkeys(config["sqnr_db"], 10**400)),
    lambda config: config["sqnr_db"].update(dict.fromkeys(config["sqnr_db"], True)),
    _put("weights", value=None),
    _put("weights", "file", value="../x"),
    _put("weights", "file", value="/etc/passwd"),
    _put("weights", "file", value="config.json"),
    _put("weights", "file", value="model-0123456789ab.safetensors"),
    _put("weights", "file", value="n" * 5000),
    _put("weights", "file", value="\0"),
    _put("weights", "file", value=""),
    _put("weights", "file", value=".."),
    _put("weights", "sha256", value="0" * 64),
    _put("weights", "layout", value=""),
    _put("weights", "layout", value="hhh"),
    lambda config: _put("weights", "layout", value="x" * len(config["weights"]["layout"]))(config),
    lambda config: _put("weights", "layout", value="h" * len(config["weights"]["layout"]))(config),
    lambda config: _put("weights", "layout", value="-" * len(config["weights"]["layout"]))(config),
    lambda config: _put("weights", "layout", value=config["weights"]["layout"][::-1])(config),
]


@pytest.mark.parametrize("change", FORGERIES, ids=range(len(FORGERIES)))
def test_a_forged_config_is_refused(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    _forge(folder, change)
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


FIELDS = ["quantization_config", "float_dtype", "traits", "example_shapes", "sqnr_db", "weights"]


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
    _forge(folder, _put("weights", "sha256", value=hashlib.sha256(data).hexdigest()))


def _codes(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith(".codes"))


def _fill(value: float, letter: str = "float16") -> Callable[[dict[str, Tensor]], Any]:
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
        _fill(float("nan")),
        _fill(float("inf")),
        _fill(-1.0),
        _fill(0.0),
        _fill(float("nan"), "float32"),
        _fill(-1.0, "float32"),
        _fill(0.0, "float32"),
    ],
    ids=range(19),
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
