"""Command-line arguments that tables and figures share."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.common.errors import CheckpointError, ConfigError, HarmoqError
from harmoq_ao.harmonization.presets import PRESETS
from harmoq_ao.quant.quantizer import check_bits
from harmoq_ao.recipes.cells import HARMOQ, Cell, Value
from harmoq_ao.recipes.published import describe, help_text
from harmoq_ao.recipes.study import Study, StudySettings
from harmoq_ao.zoo import LoadedModel, load_demo_model, load_model

_OPTION_HELP = "departure from the preset (repeatable), such as refine.steps=200 or config.joint_scale=none"
_STAGES = ("algorithm", "refine")
_BITS = re.compile(r"[Ww](\d+)[Aa](\d+)")
EXIT_ERROR = 2
"""Nothing could be done; the message says why."""
EXIT_PARTIAL = 1
"""Some cells failed, the others are in the files."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells count it."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Arguments of every study."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, help_text()
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of results; what is there is not computed again")
    add(
        "--benchmark",
        type=Path,
        required=True,
        help="folder of sets, each with HR and LR_bicubic/X2, or another usual layout",
    )
    add("--calibration", type=Path, required=True, help="folder of photographs")
    add("--sets", nargs="+", default=["Set5"], help="folders below --benchmark: Set14, Urban100, Manga109, ...")
    add(
        "--checkpoint",
        type=Path,
        nargs="+",
        help="float models by path, a scale each (default: DAT-light); below",
    )
    add("--profile", choices=("paper", "deploy"), default="paper")
    add("--preset", choices=tuple(PRESETS), default="standard", help="how much work HarmoQ and learned baselines do")
    add("--set", dest="options", action="append", default=[], type=option, metavar="NAME=VALUE", help=_OPTION_HELP)
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda")
    add("--tile", type=int, help="upscale in tiles of this side, in input pixels")
    add("--converted", action="store_true", help="measure the integer models instead of the simulations")


def option(text: str) -> tuple[str, Value]:
    """``algorithm.projection=sobel`` as name and value; values are JSON, or plain text where they are not."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} has no '=', as in refine.steps=200")
    try:
        read: Value = json.loads(value)
    except ValueError:
        read = value
    if isinstance(read, (list, dict)):
        raise argparse.ArgumentTypeError(f"{text!r}: a value is a number, a text, true, false or null")
    return name, read


def bits(text: str) -> tuple[int, int]:
    """``4`` or ``W4A32`` as bits of weights and activations."""
    match = _BITS.fullmatch(text)
    try:
        widths = (int(match[1]), int(match[2])) if match else (int(text), int(text))
        for width in widths:
            check_bits(width)
    except (ValueError, ConfigError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of bits nor like W4A32: {error}") from error
    return widths


def template(arguments: argparse.Namespace, method: str, scale: int, widths: tuple[int, int], label: str = "") -> Cell:
    """A cell as the arguments ask for; options of HarmoQ's stages go to HarmoQ only."""
    chosen = {n: v for n, v in arguments.options if method == HARMOQ or n.partition(".")[0] not in _STAGES}
    return Cell(method, *widths, scale, arguments.profile, arguments.preset, label=label).with_options(chosen)


def open_study(arguments: argparse.Namespace) -> Study:
    """The study that the arguments describe."""
    warnings.filterwarnings("ignore", category=UserWarning)  # remarks of libraries on how they use each other
    settings = StudySettings(**{f.name: getattr(arguments, f.name) for f in fields(StudySettings)})
    return Study(settings, loader(arguments.checkpoint))


def loader(checkpoints: Sequence[Path] | None) -> Callable[[int], LoadedModel]:
    """The float model of a scale: of the given files the one that has it, or DAT-light.

    Raises:
        CheckpointError: On loading, if none of the files is of the scale.
    """
    if not checkpoints:
        return load_demo_model

    @cache
    def found() -> dict[int, tuple[Path, LoadedModel]]:
        read = {path: load_model(path) for path in checkpoints}
        for path, loaded in read.items():
            text = f"{escape(path.name)}: {describe(loaded)}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        return {loaded.scale: (path, loaded) for path, loaded in read.items()}

    def load(scale: int) -> LoadedModel:
        if scale not in found():
            raise CheckpointError(
                f"No checkpoint is of scale {scale}",
                found=", ".join(f"x{s} ({path.name})" for s, (path, _) in found().items()),
                remedy="name a checkpoint for each of --scales, or fewer scales",
            )
        return found()[scale][1]

    return load


def command(module: str, argv: Sequence[str]) -> str:
    """The command as a reader would repeat it."""
    return shlex.join(["python", "-m", f"harmoq_ao.recipes.{module}", *argv])


def guarded(action: Callable[[], bool]) -> int:
    """Run a command; what ends it early becomes one sentence on standard error.

    Args:
        action: Does the work and tells whether every cell succeeded.

    Returns:
        The exit code.
    """
    console = Console(stderr=True)
    keep_memory()
    try:
        return 0 if action() else EXIT_PARTIAL
    except HarmoqError as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return EXIT_ERROR
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted; the same command continues with what is missing.[/]")
        return EXIT_INTERRUPTED
