"""The commands, on a tiny model: what they write, what they print, and how they fail."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from harmoq_ao import __version__, load_quantized
from harmoq_ao.cli import app, common
from harmoq_ao.cli.quantize import parse_rule
from harmoq_ao.cli.upscale import _tiles_shown
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.common.progress import progress_bar
from harmoq_ao.harmonization.presets import PRESETS, HarmonizeSettings
from harmoq_ao.harmonization.settings import RefineSettings
from harmoq_ao.recipes.architectures import ARCHITECTURES
from harmoq_ao.runtime import upscaler

BY_NAME = {entry.name: entry for entry in ARCHITECTURES}


def harmoq(*arguments: object) -> Result:
    widths = common.out.width, common.err.width
    common.out.width = common.err.width = 400  # temporary folders have long names
    try:
        result: Any = CliRunner().invoke(app, [str(a) for a in arguments])
    finally:
        common.out.width, common.err.width = widths
    return result


def succeeds(*arguments: object) -> str:
    result = harmoq(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object, code: int = 2) -> str:
    result = harmoq(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def photograph(path: Path, height: int = 40, width: int = 48, mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 4), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint, photographs, a benchmark and a quantized model."""
    root = tmp_path_factory.mktemp("cli")
    state = dict(BY_NAME["SwinIR/light"].build().state_dict())
    safetensors.torch.save_file(state, root / "model.safetensors")
    for index in range(2):
        photograph(root / "photographs" / f"{index}.png", seed=index)
        high = photograph(root / "set" / "HR" / f"{index}.png", seed=index)
        low = root / "set" / "LR_bicubic" / "X2" / f"{index}x2.png"
        low.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(high) as image:
            image.resize((24, 20), Image.Resampling.BICUBIC).save(low)
    options = ("--weight-bits", 4, "--act-bits", 4, "--crops", 2, "--crop-size", 16, "--preset", "none")
    succeeds("quantize", root / "model.safetensors", root / "w4", "--calibration", root / "photographs", *options)
    return root


def test_version_and_help() -> None:
    assert __version__ in succeeds("--version")
    for command in ("demo", "quantize", "evaluate", "upscale", "inspect", "report", "export"):
        assert command in succeeds("--help")
        assert "Usage" in succeeds(command, "--help")


# --- quantize ---------------------------------------------------------------------------------------------------------


def test_quantize_writes_a_model_and_a_summary(folder: Path, tmp_path: Path) -> None:
    printed = succeeds(
        *("quantize", folder / "model.safetensors", tmp_path / "out", "--calibration", folder / "photographs"),
        *("--crops", 1, "--crop-size", 16, "--lr", "--weight-bits", 4, "--act-bits", 4),
        *("--rule", "layers.0.*:W8A8", "--rule", "matmul:W8A8", "--profile", "paper", "--observer", "minmax"),
        "--relative-maps",
    )
    assert "sites" in printed
    assert "smaller" in printed
    config = load_quantized(tmp_path / "out").config
    assert (config.weight_bits, config.profile, config.observer) == (4, "paper", "minmax")
    assert config.relative_maps
    assert config.settings("layers.0.x", "linear").weight.bits == 8
    assert config.settings("layers.1.x", "matmul").act.bits == 8
    assert config.settings("layers.1.x", "linear").weight.bits == 4


def test_quantize_on_a_data_set(folder: Path, tmp_path: Path) -> None:
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted((folder / "photographs").iterdir())]
    table = datasets.Dataset.from_dict({"one": cells, "other": cells})
    table.to_parquet(tmp_path / "photographs.parquet")
    given = (
        "quantize",
        folder / "model.safetensors",
        tmp_path / "out",
        "--calibration",
        tmp_path / "photographs.parquet",
    )
    options = ("--weight-bits", 4, "--act-bits", 4, "--crops", 2, "--crop-size", 16, "--preset", "none")
    assert "image columns: one, other" in fails(*given, *options)
    succeeds(*given, *options, "--column", "one")
    quantized, reference = load_quantized(tmp_path / "out"), load_quantized(folder / "w4")
    expected = reference.model.state_dict()
    assert all(bool((tensor == expected[name]).all()) for name, tensor in quantized.model.state_dict().items())


@pytest.mark.parametrize("method", ["minmax", "harmoq"])
def test_quantize_by_method_and_preset(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(PRESETS, "fast", HarmonizeSettings(None, RefineSettings(steps=2, checks=1, crop_size=16)))
    options = ("--weight-bits", 4, "--act-bits", 4, "--crops", 2, "--crop-size", 16, "--profile", "paper")
    given = ("quantize", folder / "model.safetensors", tmp_path / "out", "--calibration", folder / "photographs")
    printed = succeeds(*given, *options, "--method", method)
    assert f"{method}, fast" in printed
    assert not list(tmp_path.glob("*.progress.safetensors"))
    config = load_quantized(tmp_path / "out").config
    assert config.observer == ("minmax" if method == "minmax" else "mse")


def test_quantize_chooses_bits_by_need(folder: Path, tmp_path: Path) -> None:
    given = ("quantize", folder / "model.safetensors", tmp_path / "out", "--calibration", folder / "photographs")
    printed = succeeds(*given, "--crops", 2, "--crop-size", 16, "--max-drop", 0.5)
    assert "below float on held-out crops" in printed
    rules = load_quantized(tmp_path / "out").config.rules
    assert {rule.weight_bits for rule in rules} <= {2, 3, 4}
    assert "--method harmoq" in fails(*given, "--max-drop", 0.5, "--method", "minmax")
    assert "leave out --lr" in fails(*given, "--max-drop", 0.5, "--lr")
    assert "Exactly one" in fails(*given, "--max-drop", 0.5, "--target-size", 10000)


def test_quantize_on_a_device(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("quantize", folder / "model.safetensors", tmp_path / "out", "--calibration", folder / "photographs")
    options = ("--weight-bits", 4, "--act-bits", 4, "--crops", 2, "--crop-size", 16, "--preset", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees 0 GPUs" in fails(*given, *options, "--device", "cuda")
    assert "expected: cpu, cuda, or cuda:0" in fails(*given, *options, "--device", "meta")
    assert not (tmp_path / "out").exists()
    succeeds(*given, *options, "--device", "cpu")
    for name in ("config.json", *(path.name for path in (folder / "w4").glob("*.safetensors"))):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "w4" / name).read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_quantize_on_a_gpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", HarmonizeSettings(None, RefineSettings(steps=2, checks=1, crop_size=16)))
    state = dict(BY_NAME["DAT/light"].build().state_dict())  # with linears that conversion runs
    safetensors.torch.save_file(state, tmp_path / "dat.safetensors")
    given = ("quantize", tmp_path / "dat.safetensors", tmp_path / "out", "--calibration", folder / "photographs")
    succeeds(*given, "--crops", 2, "--crop-size", 16, "--max-drop", 0.5, "--preset", "fast", "--device", "cuda")
    assert all(tensor.device.type == "cpu" for tensor in load_quantized(tmp_path / "out").state_dict().values())


def test_quantize_refuses_unknown_methods_and_presets(folder: Path, tmp_path: Path) -> None:
    given = ("quantize", folder / "model.safetensors", tmp_path / "out", "--calibration", folder / "photographs")
    assert "minmax" in fails(*given, "--method", "magic")
    assert "standard" in fails(*given, "--preset", "slow")
    assert not (tmp_path / "out").exists()


def test_quantize_refuses_what_makes_no_sense(folder: Path, tmp_path: Path) -> None:
    given = ("quantize", folder / "model.safetensors", tmp_path / "out", "--calibration", folder / "photographs")
    assert "Found" in fails(*given, "--weight-bits", 9).replace("found", "Found")
    assert "did you mean 'deploy'" in fails(*given, "--profile", "deplyo")
    assert "GLOB:W8A8" in fails(*given, "--rule", "layers")
    assert "matches no site" in fails(*given, "--rule", "nothing.*:W8A8")
    (tmp_path / "empty").mkdir()
    assert "no image" in fails(*given[:-1], tmp_path / "empty")
    assert "no such file" in fails("quantize", tmp_path / "none.pth", tmp_path / "out", *given[3:])
    assert "demo:x2" in fails("quantize", "demo:x7", tmp_path / "out", *given[3:])
    assert not (tmp_path / "out").exists()


def test_rules() -> None:
    rule = parse_rule("layers.0.attn::matmul_0:w2a16")
    assert (rule.sites, rule.weight_bits, rule.act_bits, rule.kind) == ("layers.0.attn::matmul_0", 2, 16, None)
    assert parse_rule("conv2d:W8A8").kind == "conv2d"
    for text in ("W8A8", "*:W8", "*:A8W8", ":W8A8", "*:W99A8"):
        with pytest.raises(ConfigError):
            parse_rule(text)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_prints_and_writes_the_same_numbers_each_time(folder: Path, tmp_path: Path) -> None:
    given = ("evaluate", folder / "w4", folder / "set", "--float", folder / "model.safetensors", "--bicubic")
    printed = succeeds(*given, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    first = json.loads((tmp_path / "r.json").read_text())["models"]
    assert list(first) == [str(folder / "w4"), str(folder / "model.safetensors"), "bicubic"]
    for results in first.values():
        assert f"{results['mean']['psnr_y']:.3f}" in printed
        assert f"{results['mean']['ssim_y']:.4f}" in printed
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [row["image"] for row in rows] == ["0", "1", "mean"] * 3
    separate = ("evaluate", folder / "w4", folder / "set" / "HR", folder / "set" / "LR_bicubic", "--scale", 2)
    succeeds(*separate, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())["models"][str(folder / "w4")]
    assert again["mean"]["psnr_y"] == first[str(folder / "w4")]["mean"]["psnr_y"]


def test_evaluate_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    assert "Scales do not agree" in fails("evaluate", folder / "w4", folder / "set", "--scale", 3)
    assert "not a benchmark folder" in fails("evaluate", folder / "w4", folder / "photographs")
    assert "compared with itself" in fails("evaluate", folder / "w4", folder / "set", "--float", folder / "w4")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (folder / "w4").iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            data[len(data) // 2] ^= 1
        (broken / file.name).write_bytes(data)
    assert "Error" in fails("evaluate", broken, folder / "set")


# --- upscale ----------------------------------------------------------------------------------------------------------


def test_upscale_keeps_the_form_and_goes_on_after_a_bad_file(folder: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    for mode in ("RGB", "RGBA", "L"):
        photograph(inputs / f"{mode}.png", 18, 21, mode)
    (inputs / "broken.png").write_bytes((inputs / "RGB.png").read_bytes()[:60])
    (inputs / "empty.png").touch()
    message = fails("upscale", folder / "w4", inputs, "--output", tmp_path / "out", "--suffix", "_x2", code=1)
    assert "3 of 5 images" in message
    assert "broken.png" in message
    assert "empty.png" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["L_x2.png", "RGBA_x2.png", "RGB_x2.png"]
    for mode in ("RGB", "RGBA", "L"):
        with Image.open(tmp_path / "out" / f"{mode}_x2.png") as image:
            assert (image.mode, image.size) == (mode, (42, 36))


def test_upscale_by_pattern_and_list(folder: Path, tmp_path: Path) -> None:
    source = folder / "photographs"
    succeeds("upscale", folder / "w4", source / "[0].png", "-o", tmp_path / "pattern")
    assert [path.name for path in (tmp_path / "pattern").iterdir()] == ["0.png"]
    (tmp_path / "list.txt").write_text(f"{source / '1.png'}\n{source / '0.png'}\n")
    succeeds("upscale", folder / "w4", tmp_path / "list.txt", "-o", tmp_path / "list")
    assert sorted(path.name for path in (tmp_path / "list").iterdir()) == ["0.png", "1.png"]
    assert (tmp_path / "list" / "0.png").read_bytes() == (tmp_path / "pattern" / "0.png").read_bytes()
    assert "files are needed" in fails("upscale", folder / "w4", "hf:some/set", "-o", tmp_path / "out")


def test_upscale_in_tiles(folder: Path, tmp_path: Path) -> None:
    source = photograph(tmp_path / "a.png", 24, 40)
    options: dict[str, tuple[object, ...]] = {"whole": (), "tiles": ("--tile", 24, "--overlap", 16)}
    results = {}
    for name, given in options.items():
        succeeds("upscale", folder / "w4", source, "-o", tmp_path / name, *given)
        with Image.open(tmp_path / name / "a.png") as image:
            results[name] = np.asarray(image).astype(int)
    assert results["whole"].shape == (48, 80, 3)
    assert np.abs(results["tiles"] - results["whole"]).mean() < 4


def test_upscale_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    source = photograph(tmp_path / "a.png", 16, 16)
    given = ("upscale", folder / "model.safetensors", source, "-o")
    succeeds(*given, tmp_path / "float32")
    succeeds(*given, tmp_path / "bfloat16", "--float-dtype", "bfloat16")
    images = [np.asarray(Image.open(tmp_path / dtype / "a.png")).astype(int) for dtype in ("float32", "bfloat16")]
    assert 0 < np.abs(images[0] - images[1]).mean() < 4


def test_upscale_by_compiled_code_of_one_size(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own work is left out: it takes a minute, and `tests/lowering/test_compiled.py` has it."""
    real, sizes = torch.compile, []

    def traced(graph: torch.fx.GraphModule, **options: object) -> object:
        sizes.append(graph)
        return real(graph, backend="aot_eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(upscaler, "FIXED_TILE", 24)
    monkeypatch.setattr(common, "FIXED_TILE", 24)
    for name, (height, width) in {"small": (9, 16), "large": (30, 50), "exact": (24, 24)}.items():
        photograph(tmp_path / "in" / f"{name}.png", height, width)
    given = ("upscale", folder / "w4", tmp_path / "in", "--overlap", 16, "-o")
    succeeds(*given, tmp_path / "eager", "--tile", 24)
    succeeds(*given, tmp_path / "compiled", "--compile")
    assert len(sizes) == 1
    for name in ("large", "exact"):
        results = [np.asarray(Image.open(tmp_path / how / f"{name}.png")) for how in ("eager", "compiled")]
        assert np.array_equal(*results)
    with Image.open(tmp_path / "compiled" / "small.png") as image:
        assert image.size == (32, 18)


def test_runtimes_are_of_quantized_models_and_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    source = photograph(tmp_path / "a.png", 16, 16)
    for option, name in (("--compile", "torch.compile"), ("--openvino", "OpenVINO")):
        message = fails("upscale", folder / "model.safetensors", source, "-o", tmp_path / "out", option)
        assert f"{name} runs quantized models" in message
    message = fails("evaluate", folder / "w4", folder / "set", "--compile", "--openvino")
    assert "at most one" in message


def test_upscale_replaces_nothing_unasked(folder: Path, tmp_path: Path) -> None:
    source = photograph(tmp_path / "in" / "a.png", 16, 16)
    given = ("upscale", folder / "w4", source, "-o")
    assert "its own source" in fails(*given, tmp_path / "in", "--overwrite")
    succeeds(*given, tmp_path / "out")
    assert "--overwrite" in fails(*given, tmp_path / "out")
    succeeds(*given, tmp_path / "out", "--overwrite")
    twin = photograph(tmp_path / "other" / "a.png", 16, 16)
    assert "one file" in fails("upscale", folder / "w4", source, twin, "-o", tmp_path / "both")
    assert "overlap" in fails(*given, tmp_path / "tiles", "--tile", 8, "--overlap", 8)
    assert "cannot be created" in fails(*given, source)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_a_saved_model(folder: Path) -> None:
    printed = succeeds("inspect", folder / "w4")
    assert "W4A4" in printed
    assert "conv2d" not in printed
    assert "conv2d" in succeeds("inspect", folder / "w4", "--all")
    report = json.loads(succeeds("inspect", folder / "w4", "--json"))
    linears = [site for site in report["sites"] if site["kind"] == "linear"]
    assert all(site["kernel"] for site in linears if site["reason"] is None)


def test_inspect_a_checkpoint(folder: Path) -> None:
    printed = succeeds("inspect", folder / "model.safetensors")
    assert "W8A8" in printed
    assert "float model" in printed


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_a_checkpoint_and_compare(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "float.safetensors"
    printed = succeeds("export", folder / "w4", target, "--check", folder / "set")
    assert "float checkpoint" in printed
    original = safetensors.torch.load_file(folder / "model.safetensors")
    assert set(safetensors.torch.load_file(target)) == set(original)
    succeeds("evaluate", target, folder / "set", "--json", tmp_path / "r.json")
    (scores,) = json.loads((tmp_path / "r.json").read_text())["models"].values()
    assert scores["mean"]["psnr_y"] > 0


def test_export_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.pt2"
    there.touch()
    assert "--overwrite" in fails("export", folder / "w4", there)
    assert "--format" in fails("export", folder / "w4", tmp_path / "m.bin")
    assert ".safetensors" in fails("export", folder / "w4", tmp_path / "m.pth", "--format", "checkpoint")
    assert "Only quantized" in fails("export", folder / "model.safetensors", tmp_path / "m.onnx")
    assert "no folder" in fails("export", folder / "w4", tmp_path / "none" / "m.onnx")
    assert "HEIGHTxWIDTH" in fails("export", folder / "w4", tmp_path / "m.pt2", "--size", "large")
    assert "images of this size" in fails("export", folder / "w4", tmp_path / "m.pt2", "--size", "0x16")
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]


# --- around the commands ----------------------------------------------------------------------------------------------


def test_interrupt_leaves_quietly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harmoq_ao.runtime.file_jobs.save_rows", interrupted)
    message = fails("upscale", folder / "w4", folder / "photographs", "-o", tmp_path, code=130)
    assert "Interrupted" in message
    assert list(tmp_path.iterdir()) == []


def test_interrupt_in_the_middle_of_an_image_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, rows = photograph(tmp_path / "in" / "a.png", 24, 40), upscaler.upscale_rows

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield next(rows(*arguments, **options))
        assert list((tmp_path / "out").iterdir()), "the file is begun"
        raise KeyboardInterrupt

    monkeypatch.setattr(upscaler, "upscale_rows", interrupted)
    tiles = ("--tile", 16, "--overlap", 8)
    fails("upscale", folder / "w4", source, "-o", tmp_path / "out", *tiles, code=130)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_tiles_of_a_large_image_have_a_bar_of_their_own() -> None:
    bar = progress_bar()
    show = _tiles_shown(bar)
    shown = []
    for total in (1, 3, 1):
        for done in range(1, total + 1):
            show(done, total)
            (task,) = bar.tasks
            shown.append((task.visible, task.completed, task.total))
    assert shown == [(False, 1, 1), (True, 1, 3), (True, 2, 3), (True, 3, 3), (False, 1, 1)]


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    result = harmoq("--verbose", "inspect", tmp_path / "none.pth")
    assert result.exit_code == 2
    assert "Traceback" in result.output


def test_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        fails("--threads", 1, "inspect", tmp_path / "none.pth")
        assert torch.get_num_threads() == 1
        fails("--threads", 0, "inspect", tmp_path / "none.pth")
    finally:
        torch.set_num_threads(before)
