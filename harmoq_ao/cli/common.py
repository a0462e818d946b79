"""What every command of `harmoq` shares: the command group, options, output, and the form of error messages.

Help must not wait for torch. Commands therefore import what they use when they run: names of ``harmoq_ao`` itself are
imported on first use, everything else is imported inside the functions.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.common.choices import FIXED_TILE, Runtime
from harmoq_ao.common.errors import ConfigError, HarmoqError, OutputError
from harmoq_ao.common.version import __version__

if TYPE_CHECKING:
    import torch

    from harmoq_ao import Report

EXIT_PARTIAL = 1
"""Some images failed, the others were written."""
EXIT_ERROR = 2
"""Nothing was done; the message says why."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, by the convention of shells."""


_PIPED = 160  # columns where there is no terminal: names of sites are long

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED)
err = Console(stderr=True)


class FloatDtype(StrEnum):
    """Type of the parts that are not quantized."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        """The type of that name in torch."""
        import torch

        found: torch.dtype = getattr(torch, self.value)
        return found


class _Group(TyperGroup):
    """Turns an error into one readable message and an exit code; with `--verbose` into the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("[yellow]Interrupted; incomplete outputs were discarded.[/]")
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
    typer.Argument(metavar="MODEL", help="Folder of a saved model, a float checkpoint, or demo:x2, demo:x3, demo:x4."),
]
TileOption = Annotated[int | None, typer.Option(min=8, help="Upscale in square tiles of this side, in input pixels.")]
OverlapOption = Annotated[int, typer.Option(min=0, help="Overlap of adjacent tiles, in input pixels.")]
OpenVinoOption = Annotated[
    bool,
    typer.Option("--openvino", help=f"Run a quantized model with OpenVINO, by default in tiles of {FIXED_TILE}."),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help=f"Fuse the float parts of a quantized model with torch.compile, by default in tiles of {FIXED_TILE}: "
        "about twice as fast after a minute of compilation; needs a C++ compiler.",
    ),
]
DtypeOption = Annotated[FloatDtype | None, typer.Option(help="Type of the parts that are not quantized.")]
KernelDeviceOption = Annotated[
    str, typer.Option(help="Device whose kernels are named, cpu or cuda; it need not be present.")
]


def _print_version(value: bool) -> None:
    if value:
        import torch

        out.print(f"harmoq-ao {__version__} (torch {torch.__version__})", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show log messages and tracebacks.")] = False,
) -> None:
    """Options before the command apply to every command."""
    from rich.logging import RichHandler

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_time=False)],
    )
    logging.getLogger("harmoq_ao").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:  # libraries warn about how they use one another
        warnings.filterwarnings("ignore", category=UserWarning)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    keep_memory()


def chosen_runtime(openvino: bool, compiled: bool) -> Runtime:
    """The runtime that ``--openvino`` and ``--compile`` ask for.

    Raises:
        ConfigError: Both are given.
    """
    if openvino and compiled:
        raise ConfigError("Two runtimes were chosen", found="--openvino and --compile", expected="at most one of them")
    return Runtime.openvino if openvino else Runtime.compiled if compiled else Runtime.torch


def fixed_tile(tile: int | None, runtime: Runtime) -> int | None:
    """The given tile, or the default of a runtime that compiles for each size."""
    return tile or (None if runtime is Runtime.torch else FIXED_TILE)


def check_output_file(path: Path) -> None:
    """Raise OutputError unless a file can be created at ``path``."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise OutputError(
            f"{path} cannot be written",
            found=found,
            expected="a file name in an existing folder",
            remedy="choose another output",
        )


def join_ranks(ctx: typer.Context) -> None:
    """Make processes that torchrun started ranks of one run until the command ends; only the first one prints.

    Raises:
        ConfigError: torchrun's environment variables are unusable.
        RankLostError: The other ranks cannot be reached.
    """
    from harmoq_ao.common.distributed import is_first, launched_by_torchrun

    ctx.with_resource(launched_by_torchrun())
    out.quiet = err.quiet = not is_first()


def _print_error(error: HarmoqError) -> None:
    if error.rank is not None:  # no other rank will report it
        err.quiet = False
        err.print(f"[red]rank {error.rank}[/]:", highlight=False)
    err.print(f"[bold red]Error:[/] [red]{escape(error.what.rstrip('.'))}.[/]", highlight=False, soft_wrap=True)
    for label, text in (("found", error.found), ("expected", error.expected), ("what to do", error.remedy)):
        if text is not None:
            err.print(f"  {label}: {escape(str(text))}", highlight=False, soft_wrap=True)


def summary(report: Report) -> str:
    """The share of a model that is quantized, in a line, and what stays float for which reason, in another."""
    quantized = sum(row.quantized for row in report.sites)
    return (
        f"{quantized} of {len(report.sites)} sites (linears and attention products) quantized, "
        f"{100 * report.macs_share:.1f} % of all multiply-accumulates"
        + "".join(f"\n{sentence}" for sentence in [report.float_sentence()] if sentence)
    )
