"""The nightly check: what it measures, keeps and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from harmoq_ao.common.errors import ConfigError, DatasetError
from harmoq_ao.harmonization.presets import HarmonizeSettings
from harmoq_ao.recipes import generality
from harmoq_ao.recipes.generality import Nightly, Settings, Split, Upscaling, bicubic, check, main, psnr, train
from harmoq_ao.recipes.options import EXIT_ERROR, EXIT_PARTIAL
from tests.models import BY_NAME

ENTRY = BY_NAME["SwinIR/light"]
SETTINGS = Settings("of these", steps=2, pairs=4, seed=0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(4):
        noise = torch.randint(256, (20, 20, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((140, 140), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def nightly(folder: Path, photographs: Path) -> Nightly:
    return Nightly(folder, Split.of(photographs, 0), SETTINGS, "cpu")


def test_a_preset_below_dobi_or_a_float_network_below_bicubic_is_a_failure(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    night = nightly(tmp_path, photographs)
    reached = {"dobi": 40.0, "fast": 39.9, "long": 40.1}
    monkeypatch.setattr(Nightly, "network", lambda *_: None)
    monkeypatch.setattr(Nightly, "scores", lambda *_: {"float": 30.0, "bicubic": 30.5})
    monkeypatch.setattr(Nightly, "fidelity", lambda *arguments: reached[arguments[-1]])
    table, failures = check(night, [ENTRY], [4], ["fast", "long"])
    assert [("bicubic" in failure, "fast" in failure) for failure in failures] == [(True, False), (False, True)]
    assert table.splitlines()[-1] == "| SwinIR/light | 30.50 | 30.00 | W4A4 | 40.00 | 39.90 | 40.10 |"
    assert capsys.readouterr().err.splitlines() == table.splitlines()[-1:]  # as soon as it is known


def test_what_is_there_is_not_computed_again(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = HarmonizeSettings(None, None, crops=2, crop_size=16, held_out=1)
    monkeypatch.setattr(generality, "preset", lambda _: few)
    monkeypatch.setattr(generality, "EVALUATED", 2)

    def measured() -> tuple[str, list[str]]:
        return check(nightly(tmp_path, photographs), [ENTRY], [4], ["none"])

    first = measured()
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    own = ("float.json", "float.safetensors", "W4A4-dobi.json", "W4A4-none.json")
    assert files == {"settings.json", *(f"SwinIR-light/{name}" for name in own)}
    for name in ("train", "psnr"):
        monkeypatch.setattr(generality, name, lambda *_: pytest.fail("it is there"))
    assert measured() == first


def test_records_of_other_settings_are_refused(tmp_path: Path, photographs: Path) -> None:
    nightly(tmp_path, photographs)
    with pytest.raises(ConfigError, match="other settings"):
        Nightly(tmp_path, Split.of(photographs, 0), Settings("of others", 2, 4, 0), "cpu")


def test_settings_and_devices_that_make_no_sense(tmp_path: Path, photographs: Path) -> None:
    for steps, pairs in ((0, 4), (2, 0), (-1, 4)):
        with pytest.raises(ConfigError, match="must be a whole number"):
            Settings("of these", steps, pairs, seed=0)
    with pytest.raises(ConfigError, match="device"):
        Nightly(tmp_path, Split.of(photographs, 0), SETTINGS, "toaster")


def test_training_comes_closer_to_the_photographs() -> None:
    low = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    high = bicubic(low)
    model = Upscaling(ENTRY.build())

    def upscaled() -> Tensor:
        with torch.no_grad():
            return model.eval()(low)

    before = psnr(upscaled(), high)
    train(model, low, high, steps=12, seed=0, title="Training")
    assert psnr(upscaled(), high) > before + 3


def test_no_photograph_is_in_two_parts(photographs: Path, tmp_path: Path) -> None:
    for folder in (None, photographs):
        split = Split.of(folder, 0)
        parts = [split.learned, split.held_out, split.compared]
        assert all(parts)
        assert len(set().union(*parts)) == sum(map(len, parts))
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    with pytest.raises(DatasetError, match="at least three"):
        Split.of(tmp_path, 0)


def test_the_exit_code_tells(tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--output", str(tmp_path / "a"), "--images", str(photographs)]
    for failures, expected in (([], 0), (["worse"], EXIT_PARTIAL)):
        monkeypatch.setattr(generality, "check", lambda *_, found=failures: ("| table |\n", found))
        assert main(arguments) == expected
        assert ("worse" in (tmp_path / "a" / "generality.md").read_text()) == bool(failures)
    monkeypatch.undo()
    arguments[1] = str(tmp_path / "b")
    assert main([*arguments, "--architectures", "SCUNet"]) == EXIT_ERROR
