"""What every command of `harmoq` shares: the command group, options, output, and the form of error messages.

Help must not wait for torch. Commands therefore import what they use when they run: names of ``harmoq_ao`` itself are
imported on first use, everything else is imported inside the functions.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.common.choices import FIXED_TILE, Runtime
from harmoq_ao.common.errors import ConfigError, HarmoqError
from harmoq_ao.common.files import reason_of
from harmoq_ao.common.output import check_output_file as check_output_file
from harmoq_ao.common.version import __version__

if TYPE_CHECKING:
    import torch

    from harmoq_ao import Report

EXIT_PARTIAL = 1
"""Some images failed, the others were written."""
EXIT_ERROR = 2
"""Nothing was done; the message says why."""
EXIT_SIGNALLED = 128
"""What a signal's number is added to, by the convention of shells: 130 after Ctrl-C, 143 after SIGTERM."""


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


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end: handled wherever Ctrl-C is, so that files are left whole."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Context manager in which SIGTERM and the end of the terminal (unless nohup ignores it) raise `Stopped`."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    former = {number: signal.getsignal(number) for number in numbers}
    try:
        replaced = [number for number in numbers if former[number] is signal.SIG_DFL]
        for number in replaced:
            signal.signal(number, stop)
    except ValueError:  # a thread other than the main one handles no signals
        replaced = []
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, former[number])


class _Group(TyperGroup):
    """Turns an error into one readable message and an exit code; with `--verbose` into the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _signals_as_interrupts():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            number = interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT
            by = f" by {interrupt}" if isinstance(interrupt, Stopped) else ""
            err.print(f"[yellow]Interrupted{by}; incomplete outputs were discarded.[/]")
            raise typer.Exit(EXIT_SIGNALLED + number) from None
        except HarmoqError as error:
            _end(error, ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone, which click handles
                raise
            _end(_of_system(error), ctx)


def _end(error: HarmoqError, ctx: Any) -> None:
    if ctx.params.get("verbose"):
        err.print_exception()
    else:
        _print_error(error)
    raise typer.Exit(EXIT_ERROR) from error


def _of_system(error: OSError) -> HarmoqError:
    """An error of the system that no room has put into words."""
    name = error.filename if isinstance(error.filename, str | bytes) else None
    what = "The system refused to read or write" if name is None else f"{os.fsdecode(name)[:200]} cannot be used"
    return HarmoqError(what, found=reason_of(error), remedy="check the path, its mode and the space on the disk")


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
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs about a damaged file, it raises too
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    keep_memory()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not lose what follows it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
