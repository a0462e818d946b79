"""`harmoq quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch

import harmoq_ao
from harmoq_ao import BASELINES, METHODS, PRESETS, load_quantized
from harmoq_ao.cli.quantize import parse_rule
from harmoq_ao.common.choices import PRESET_NAMES
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.presets import HarmonizeSettings
from harmoq_ao.harmonization.settings import RefineSettings
from tests.cli.command import QUICK, fails, succeeds
from tests.models import BY_NAME

Given = tuple[Any, ...]


@pytest.fixture
def given(folder: Path, tmp_path: Path) -> Given:
    """The command with all it must be given; its output is `out`."""
    return ("quantize", folder / "model.safetensors", tmp_path / "out", "--calibration", folder / "photographs")


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset `fast` at two steps of refinement."""
    monkeypatch.setitem(PRESETS, "fast", HarmonizeSettings(None, RefineSettings(steps=2, checks=1, crop_size=16)))


def test_the_help_offers_every_method_and_preset() -> None:
    assert ("harmoq", *BASELINES) == METHODS
    assert tuple(PRESETS) == PRESET_NAMES


def test_quantize_writes_a_model_and_a_summary(given: Given, tmp_path: Path) -> None:
    printed = succeeds(
        *(*given, "--crops", 1, "--crop-size", 16, "--lr", "--weight-bits", 4, "--act-bits", 4),
        *("--rule", "layers.0.*:W8A8", "--rule", "matmul:W8A8", "--profile", "paper", "--observer", "minmax"),
        "--no-relative-maps",
    )
    assert "sites" in printed
    assert "smaller" in printed
    config = load_quantized(tmp_path / "out").config
    assert (config.weight_bits, config.profile, config.observer) == (4, "paper", "minmax")
    assert not config.relative_maps
    assert config.settings("layers.0.x", "linear").weight.bits == 8
    assert config.settings("layers.1.x", "matmul").act.bits == 8
    assert config.settings("layers.1.x", "linear").weight.bits == 4


def test_quantize_on_a_data_set(given: Given, folder: Path, tmp_path: Path) -> None:
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted((folder / "photographs").iterdir())]
    table = datasets.Dataset.from_dict({"one": cells, "other": cells})
    table.to_parquet(tmp_path / "photographs.parquet")
    given = (*given, "--calibration", tmp_path / "photographs.parquet")
    assert "image columns: one, other" in fails(*given, *QUICK)
    succeeds(*given, *QUICK, "--column", "one")
    quantized, reference = load_quantized(tmp_path / "out"), load_quantized(folder / "w4")
    expected = reference.model.state_dict()
    assert all(bool((tensor == expected[name]).all()) for name, tensor in quantized.model.state_dict().items())


@pytest.mark.usefixtures("two_steps")
@pytest.mark.parametrize("method", ["minmax", "harmoq"])
def test_quantize_by_method_and_preset(given: Given, tmp_path: Path, method: str) -> None:
    printed = succeeds(*given, *QUICK, "--preset", "auto", "--profile", "paper", "--method", method)
    assert f"{method}, fast" in printed
    assert not list(tmp_path.glob("*.progress.safetensors"))
    config = load_quantized(tmp_path / "out").config
    assert config.observer == ("minmax" if method == "minmax" else "mse")


def test_quantize_in_mixed_precision(given: Given, tmp_path: Path) -> None:
    printed = succeeds(*given, "--crops", 2, "--crop-size", 16, "--max-drop", 0.5)
    assert "below float on held-out crops" in printed
    rules = load_quantized(tmp_path / "out").config.rules
    assert {rule.weight_bits for rule in rules} <= {2, 3, 4}
    assert "--method harmoq" in fails(*given, "--max-drop", 0.5, "--method", "minmax")
    assert "leave out --lr" in fails(*given, "--max-drop", 0.5, "--lr")
    assert "Exactly one" in fails(*given, "--max-drop", 0.5, "--target-size", 10000)


def test_quantize_on_a_device(given: Given, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees 0 GPUs" in fails(*given, *QUICK, "--device", "cuda")
    assert "expected: cpu, cuda, or cuda:0" in fails(*given, *QUICK, "--device", "meta")
    assert not (tmp_path / "out").exists()
    succeeds(*given, *QUICK, "--device", "cpu")
    for name in ("config.json", *(path.name for path in (folder / "w4").glob("*.safetensors"))):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "w4" / name).read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.usefixtures("two_steps")
def test_quantize_on_a_gpu(folder: Path, tmp_path: Path) -> None:
    state = dict(BY_NAME["DAT/light"].build().state_dict())  # with linears that conversion runs
    safetensors.torch.save_file(state, tmp_path / "dat.safetensors")
    given = ("quantize", tmp_path / "dat.safetensors", tmp_path / "out", "--calibration", folder / "photographs")
    succeeds(*given, "--crops", 2, "--crop-size", 16, "--max-drop", 0.5, "--preset", "fast", "--device", "cuda")
    assert all(tensor.device.type == "cpu" for tensor in load_quantized(tmp_path / "out").state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "magic"), "minmax"),
        (("--preset", "slow"), "standard"),
        (("--weight-bits", 9), "found: 9"),
        (("--profile", "deplyo"), "did you mean 'deploy'"),
        (("--rule", "layers"), "GLOB:W8A8"),
        (("--rule", "nothing.*:W8A8"), "matches no site"),
    ],
)
def test_quantize_refuses_senseless_options(given: Given, tmp_path: Path, options: Given, message: str) -> None:
    assert message in fails(*given, *options)
    assert not (tmp_path / "out").exists()


def test_quantize_refuses_missing_files(given: Given, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no image" in fails(*given, "--calibration", tmp_path / "empty")
    assert "no such file" in fails("quantize", tmp_path / "none.pth", *given[2:])
    assert "demo:x2" in fails("quantize", "demo:x7", *given[2:])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["notes", "file", "file/below", "x" * 300, "new/" + "x" * 300])
def test_an_output_that_cannot_be_one_is_known_before_the_work(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").touch()
    monkeypatch.setattr(harmoq_ao, "open_float", lambda *_: pytest.fail("the work has begun"))
    message = fails(*given[:2], tmp_path / output, *given[3:])
    assert "holds something else than a saved model" in message or "cannot be written to" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes"]


def test_an_output_below_a_folder_that_is_missing(given: Given, tmp_path: Path) -> None:
    succeeds(*given[:2], tmp_path / "new" / "deep", *given[3:], *QUICK)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["deep"]


def test_rules() -> None:
    rule = parse_rule("layers.0.attn::matmul_0:w2a16")
    assert (rule.sites, rule.weight_bits, rule.act_bits, rule.kind) == ("layers.0.attn::matmul_0", 2, 16, None)
    assert parse_rule("conv2d:W8A8").kind == "conv2d"
    for text in ("W8A8", "*:W8", "*:A8W8", ":W8A8", "*:W99A8"):
        with pytest.raises(ConfigError):
            parse_rule(text)


def test_what_a_trainer_left_is_told_and_which_weights_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    trained = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    path = tmp_path / "trained.pth"
    torch.save({"params": {f"module.{name}": value for name, value in trained.items()}, "params_ema": state}, path)
    given = ("quantize", path, tmp_path / "out", "--calibration", folder / "photographs", *QUICK)
    printed = succeeds(*given)
    assert "took the weights at params_ema" in printed
    assert "contractions stay float" in printed
    assert "took the weights at params.module" in succeeds(*given, "--weights", "model")
    assert "Expected: auto or ema or model".casefold() in fails(*given, "--weights", "best").casefold()
    assert "a quantized model that was saved here already" in fails("quantize", tmp_path / "out", *given[2:])


@pytest.mark.usefixtures("two_steps")
def test_a_progress_file_of_another_run_is_refused(given: Given, folder: Path, tmp_path: Path) -> None:
    settings = ("--crops", 2, "--crop-size", 16, "--preset", "fast", "--profile", "paper")
    keep = tmp_path / "kept"

    def saved(path: Path, missing_ok: bool = False) -> None:
        path.rename(keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", saved)
        succeeds(*given, *settings, "--weight-bits", 3, "--act-bits", 3)
    keep.rename(tmp_path / "out.progress.safetensors")
    printed = fails(*given, *settings, "--weight-bits", 2, "--act-bits", 3)
    assert "holds the progress of other work" in printed
    assert "quantization.weight_bits: 3 in the file, 2 now" in printed
