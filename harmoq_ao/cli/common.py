"""What every command of `harmoq` shares: the group, its options, output and how errors are told."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from typer.core import TyperGroup

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.common.distributed import is_first, is_own, launched_by_torchrun
from harmoq_ao.common.errors import ConfigError, HarmoqError
from harmoq_ao.common.version import __version__
from harmoq_ao.runtime.upscaler import FIXED_TILE, Runtime
from harmoq_ao.sites.report import Report

EXIT_PARTIAL = 1
"""Some images failed, the others were written."""
EXIT_ERROR = 2
"""Nothing could be done; the message says why."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells count it."""


_PIPED = 160  # columns where there is no terminal: names of sites are long

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED)
err = Console(stderr=True)


class FloatDtype(StrEnum):
    """Type of the parts that are not integers."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        """As torch names it."""
        return torch.float32 if self is FloatDtype.float32 else torch.bfloat16


class _Group(TyperGroup):
    """Turns errors into one readable message and an exit code; `--verbose` shows the traceback instead."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("[yellow]Interrupted; outputs that were not complete were not written.[/]")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except HarmoqError as error:
            if ctx.params.get("verbose"):
                err.print_exception()
            else:
                _print_error(error)
            raise typer.Exit(EXIT_ERROR) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-training quantization of image super-resolution transformers to 8, 4, 3 and 2 bits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A saved model's folder, a float checkpoint, or demo:x2, x3, x4."),
]
TileOption = Annotated[int | None, typer.Option(min=8, help="Upscale in tiles of this side, in input pixels.")]
OverlapOption = Annotated[int, typer.Option(min=0, help="Pixels that adjacent tiles share.")]
OpenVinoOption = Annotated[
    bool,
    typer.Option("--openvino", help=f"Let OpenVINO run a quantized model, in tiles of {FIXED_TILE} by default."),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help=f"Let torch.compile join its float parts, in tiles of {FIXED_TILE} by default: a minute of compiling, and "
        "a C++ compiler, for twice the speed.",
    ),
]
DtypeOption = Annotated[FloatDtype | None, typer.Option(help="Type of the parts that are not integers.")]


def _print_version(value: bool) -> None:
    if value:
        out.print(f"harmoq-ao {__version__} (torch {torch.__version__})", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice by default.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show log messages and tracebacks.")] = False,
) -> None:
    """Options before the command apply to every command."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_time=False)],
    )
    logging.getLogger("harmoq_ao").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:  # remarks of libraries on how they use each other
        warnings.filterwarnings("ignore", category=UserWarning)
    if threads is not None:
        torch.set_num_threads(threads)
    keep_memory()


def chosen_runtime(openvino: bool, compiled: bool) -> Runtime:
    """What ``--openvino`` and ``--compile`` ask for.

    Raises:
        ConfigError: Both.
    """
    if openvino and compiled:
        raise ConfigError("One of them runs the model", found="--openvino and --compile", expected="at most one")
    return Runtime.openvino if openvino else Runtime.compiled if compiled else Runtime.torch


def fixed_tile(tile: int | None, runtime: Runtime) -> int | None:
    """The tile that was asked for, or what a runtime for few sizes needs."""
    return tile or (None if runtime is Runtime.torch else FIXED_TILE)


def work_together(ctx: typer.Context) -> None:
    """Until the command ends, the processes that torchrun started are ranks of one run, and only the first prints.

    Raises:
        ConfigError: torchrun's environment variables are not usable.
        RankLostError: The other ranks cannot be reached.
    """
    ctx.with_resource(launched_by_torchrun())
    out.quiet = err.quiet = not is_first()


def _print_error(error: HarmoqError) -> None:
    if is_own(error):  # of one rank, whichever it is
        err.quiet = False
        err.print(f"[red]{escape(error.__notes__[0])}[/]:", highlight=False)
    err.print(f"[bold red]Error:[/] [red]{escape(error.what.rstrip('.'))}.[/]", highlight=False, soft_wrap=True)
    for label, text in (("found", error.found), ("expected", error.expected), ("what to do", error.remedy)):
        if text is not None:
            err.print(f"  {label}: {escape(str(text))}", highlight=False, soft_wrap=True)


def summary(report: Report) -> str:
    """How much of a model is quantized, in a line."""
    quantized = sum(row.quantized for row in report.sites)
    return (
        f"{quantized} of {len(report.sites)} sites (linears and attention products) quantized, "
        f"{100 * report.macs_share:.1f} % of all multiply-accumulates"
    )
