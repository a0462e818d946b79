"""`harmoq upscale`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harmoq_ao.cli import common
from harmoq_ao.cli.upscale import _tiles_shown
from harmoq_ao.common.progress import progress_bar
from harmoq_ao.runtime import upscaler
from tests.cli.command import fails, harmoq, photograph, succeeds


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
    assert "its own source" in fails(*given, source)
    assert "cannot be written to" in fails(*given, tmp_path / "out" / "a.png" / "below")


def test_interrupt_leaves_quietly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harmoq_ao.runtime.file_jobs.save_rows", interrupted)
    message = fails("upscale", folder / "w4", folder / "photographs", "-o", tmp_path, code=130)
    assert "Interrupted;" in message
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals as in a terminal: tests that run under `nohup` or in the background inherit ignored ones."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_leave_quietly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """As Ctrl-C: in the middle of a file, which is removed; afterwards the process handles signals as before."""
    number, real = signal.Signals[name], upscaler.upscale_rows
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]

    def struck(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield next(real(*arguments, **options))
        assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"], "the file is begun"
        os.kill(os.getpid(), number)
        yield from ()

    monkeypatch.setattr(upscaler, "upscale_rows", struck)
    source = folder / "photographs" / "0.png"
    message = fails("upscale", folder / "w4", source, "-o", tmp_path, "--tile", 16, "--overlap", 8, code=code)
    assert ("Interrupted;" if name == "SIGINT" else f"Interrupted by {name};") in message
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_nohup_is_heeded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmoq_ao.cli.upscale.chosen_runtime", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        succeeds("upscale", folder / "w4", folder / "photographs", "-o", tmp_path / "out")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_that_nobody_foresaw_leaves_the_others_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = upscaler.Upscaler.rows

    def rows(self: Any, image: Any, *options: Any) -> Iterator[Any]:
        if image.path.name == "1.png":
            raise ZeroDivisionError("a bug\nin two lines")
        return real(self, image, *options)

    monkeypatch.setattr(upscaler.Upscaler, "rows", rows)
    for index in range(3):
        photograph(tmp_path / "in" / f"{index}.png", 12, 12)
    message = fails("upscale", folder / "w4", tmp_path / "in", "-o", tmp_path / "out", code=1)
    assert "1.png: ZeroDivisionError: a bug. What to do: run it with --verbose" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]


def test_a_tree_is_mirrored_and_an_interrupted_run_continued(folder: Path, tmp_path: Path) -> None:
    """With the results below the images, as people keep them."""
    names = ["a.png", "s/a.png", "s/t/b.png", "s/t/a.gif"]
    for name in names:
        photograph(tmp_path / name, 12, 12)
    (tmp_path / "s" / "notes.txt").write_text("x")
    out = tmp_path / "large"
    given = ("upscale", folder / "w4", tmp_path, "-r", "-o", out)
    succeeds(*given)
    expected = ["a.png", "s/a.png", "s/t/a.png", "s/t/b.png"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == expected
    (out / "s" / "a.png").unlink()
    kept = (out / "a.png").stat().st_mtime_ns
    result = harmoq(*given, "--skip-existing")
    assert result.exit_code == 0
    assert "1 of 1 images written" in result.output
    assert "3 were there" in result.output
    assert "notes.txt: no image by its suffix" in result.output
    assert "in the folder of the results" in result.output
    assert (out / "a.png").stat().st_mtime_ns == kept
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == expected


def test_nothing_is_left_to_do(folder: Path, tmp_path: Path) -> None:
    """The model is then not even opened."""
    photograph(tmp_path / "in" / "a.png", 12, 12)
    succeeds("upscale", folder / "w4", tmp_path / "in", "-o", tmp_path / "out")
    again = succeeds("upscale", tmp_path / "none", tmp_path / "in", "-o", tmp_path / "out", "--skip-existing")
    assert "0 of 0 images written" in again
    assert "1 were there" in again


def test_one_image_to_a_file_of_another_format(folder: Path, tmp_path: Path) -> None:
    source = photograph(tmp_path / "a.png", 12, 12)
    succeeds("upscale", folder / "w4", source, "-o", tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (24, 24))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp1252"])
def test_a_console_that_cannot_print_a_name_loses_nothing(folder: Path, tmp_path: Path, encoding: str) -> None:
    for name in ("Größe 東京.png", os.fsdecode(b"caf\xe9.png"), "\N{GRINNING FACE}.png", "100% #1 [2]\n*?.png"):
        photograph(tmp_path / "in" / name, 12, 12)
        (tmp_path / "in" / f"broken {name}").write_bytes(b"x")
    (tmp_path / "in" / "東.txt").touch()
    command = [sys.executable, "-m", "harmoq_ao.cli", "upscale", str(folder / "w4"), str(tmp_path / "in")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "東")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == 1, done.stderr
    assert b"4 of 8 images written" in done.stdout
    assert done.stderr.count(b"is not an image") == 4
    assert len(list((tmp_path / "東").iterdir())) == 4


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
