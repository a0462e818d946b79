"""Descriptions of architectures, above all the ones that must be refused, and the limits of constructors."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spandrel import MAIN_REGISTRY
from torch import nn

from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.recipes.architectures import ARCHITECTURES, CONVOLUTIONAL, Architecture, forward
from harmoq_ao.zoo import architectures
from tests.models import BY_NAME

SWINIR = BY_NAME["SwinIR/light"]


def test_the_table_covers_every_architecture_of_spandrel() -> None:
    multiplying = {entry.name.split("/")[0] for entry in ARCHITECTURES}
    assert not multiplying & set(CONVOLUTIONAL)
    assert multiplying | set(CONVOLUTIONAL) == {str(support.architecture.id) for support in MAIN_REGISTRY}


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
def test_rebuilt_models_give_the_same_bits(entry: Architecture) -> None:
    model = entry.build()
    spec = architectures.architecture_spec(model)
    rebuilt = architectures.build_architecture(json.loads(json.dumps(spec)))
    assert spec["architecture"] == entry.name.split("/")[0]
    assert rebuilt.hyperparameters == model.hyperparameters
    assert not rebuilt.training
    # Buffers that the constructor computes need not be saved: only statistics, and GFPGAN's noise, are data.
    buffers = dict(rebuilt.named_buffers())
    for name, buffer in model.named_buffers():
        if not any(part in name for part in ("running_", "num_batches", "noises.")):
            assert torch.equal(buffer, buffers[name]), name
    rebuilt.load_state_dict(dict(model.state_dict()), strict=True)
    for size in entry.sizes:
        image = entry.example(size)
        assert torch.equal(forward(rebuilt, image), forward(model, image))


def test_rebuilding_leaves_the_random_state_alone() -> None:
    spec = architectures.architecture_spec(SWINIR.build())
    torch.manual_seed(5)
    architectures.build_architecture(spec)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_models_that_cannot_be_described() -> None:
    class OwnNorm(nn.LayerNorm):
        pass

    arguments = {**SWINIR.arguments, "norm_layer": OwnNorm}
    own_norm = Architecture("SwinIR/own", arguments).build()
    with pytest.raises(SavedModelError, match="norm_layer"):
        architectures.architecture_spec(own_norm)
    with pytest.raises(SavedModelError, match=r"torch\.nn\.modules\.linear:Linear"):
        architectures.architecture_spec(nn.Linear(2, 2))


_SCALARS = st.none() | st.booleans() | st.integers(-4096, 4096) | st.floats(-4096, 4096) | st.text(max_size=20)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5).filter(lambda key: key != "tuple"), inner, max_size=3)
    ),
    max_leaves=8,
)


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    return 0 if inner is None else 1 + max((_depth(item) for item in inner), default=0)


def _typed(value: object) -> object:
    """`value` with its types made visible, so that a list never equals a tuple nor 1 equals True."""
    if isinstance(value, list | tuple):
        return type(value), [_typed(item) for item in value]
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    return type(value), value


@given(value=_VALUES.filter(lambda value: _depth(value) <= 3))
def test_hyperparameters_survive_json(value: object) -> None:
    restored = architectures._decode(json.loads(json.dumps(architectures._encode(value, "x"))), "x")
    assert _typed(restored) == _typed(value)


def swinir_spec(**changes: object) -> dict[str, Any]:
    spec = architectures.architecture_spec(SWINIR.build())
    spec["hyperparameters"].update(changes)
    return spec


@pytest.mark.parametrize(
    "reference",
    [
        None,
        7,
        "os:system",
        "builtins:eval",
        "torch.nn:Linear",
        "spandrel.architectures:SwinIR",
        "spandrel.architectures.SwinIR.__arch.SwinIR:nn",
        "spandrel.architectures.SwinIR.__arch.SwinIR:nn.Linear",
        "spandrel.architectures.SwinIR.__arch.SwinIR:SwinTransformerBlock",
        "spandrel.architectures.SwinIR.__arch.SwinIR:window_partition",
        "spandrel.architectures.SwinIR.__arch.SwinIR:Absent",
        "spandrel.architectures.Absent:SwinIR",
        "spandrel.architectures.SwinIR.__arch.SwinIR:SwinIR\n",
        "evil.spandrel.architectures.SwinIR.__arch.SwinIR:SwinIR",
    ],
)
def test_only_models_of_spandrel_can_be_named(reference: object) -> None:
    with pytest.raises(SavedModelError, match="description of the architecture"):
        architectures.build_architecture({**swinir_spec(), "class": reference})


def test_naming_another_module_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "executed"
    (tmp_path / "payload.py").write_text(f"open({str(target)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SavedModelError):
        architectures.build_architecture({**swinir_spec(), "class": "payload:SwinIR"})
    assert not target.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 3}, "unknown \\['colour'\\]"),
        ({"window_size": "8"}, "window_size the wrong type"),
        ({"upsampler": 2}, "upsampler the wrong type"),
        ({"qkv_bias": 1}, "qkv_bias the wrong type"),
        ({"embed_dim": 10**9}, "implausible hyperparameter embed_dim"),
        ({"mlp_ratio": 1e30}, "implausible hyperparameter mlp_ratio"),
        ({"upsampler": "x" * 1000}, "implausible hyperparameter upsampler"),
        ({"depths": [1] * 1000}, "implausible hyperparameter depths"),
        ({"depths": [[[[[1]]]]]}, "unusable hyperparameter depths"),
        ({"num_heads": [0, 0]}, "cannot be constructed"),
        ({"depths": None}, "cannot be constructed"),
        ({"img_size": 4096}, "MiB"),
        ({"depths": [4096] * 64, "num_heads": [2] * 64}, "operations"),
    ],
)
def test_bad_hyperparameters(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SavedModelError, match=message):
        architectures.build_architecture(swinir_spec(**changes))


@pytest.mark.parametrize("spec", [None, [], "SwinIR", {}, {"class": swinir_spec()["class"]}])
def test_descriptions_without_the_needed_parts(spec: object) -> None:
    with pytest.raises(SavedModelError, match="description of the architecture"):
        architectures.build_architecture(spec)


def test_missing_arguments_are_named() -> None:
    spec = architectures.architecture_spec(BY_NAME["AuraSR"].build())
    del spec["hyperparameters"]["dim"]
    with pytest.raises(SavedModelError, match="missing \\['dim'\\]"):
        architectures.build_architecture(spec)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(swinir_spec()["hyperparameters"])),
    value=st.none()
    | st.booleans()
    | st.integers(-8, 64)
    | st.text(max_size=5)
    | st.lists(st.integers(-2, 16), max_size=3),
)
def test_any_changed_hyperparameter_builds_or_is_refused(name: str, value: object) -> None:
    with contextlib.suppress(SavedModelError):
        assert isinstance(architectures.build_architecture(swinir_spec(**{name: value})), nn.Module)
