"""`harmoq export`: a saved model for other tools."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

import harmoq_ao
from harmoq_ao.cli.common import app, check_output_file, err, out
from harmoq_ao.common.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from harmoq_ao import QuantizedModel


class Format(StrEnum):
    """File format of an exported model."""

    onnx = "onnx"
    openvino = "openvino"
    program = "program"
    checkpoint = "checkpoint"


_SUFFIXES = {
    Format.onnx: ".onnx",
    Format.openvino: ".xml",
    Format.program: ".pt2",
    Format.checkpoint: ".safetensors",
}
_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


@app.command("export")
def export_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A .onnx, .xml, .pt2 or .safetensors file.")],
    kind: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="ONNX, OpenVINO IR, torch.export program, or float checkpoint; by default by suffix.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Input pixels, 128 or HEIGHTxWIDTH; by default 128, or any size where format and graph allow it."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="HR_FOLDER", help="Compare the PSNR of the model and of the file on these images."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Export a quantized model: ONNX, OpenVINO IR, a torch.export program, or a float checkpoint of its weights."""
    kind = _format(output, kind)
    wanted = _size(size, kind)
    _check_output(output, kind, overwrite)
    if not Path(model).is_dir():
        raise ConfigError("Only quantized models are exported", found=model, expected="a folder from harmoq quantize")
    with err.status("Reading the model"):
        quantized = harmoq_ao.load_quantized(model)
    pairs = None if check is None else harmoq_ao.load_pairs(check, None, quantized.traits.scale)
    with err.status(f"Exporting to {kind.value}"):
        found, multiple, remark = _exported(quantized, output, kind, wanted)
    place = "" if kind is Format.checkpoint else f", images {_text(found)}" if found else _free_text(multiple)
    out.print(f"{escape(str(output))}: {output.stat().st_size:,} bytes{place}", highlight=False, soft_wrap=True)
    if remark:
        out.print(escape(remark), highlight=False, soft_wrap=True)
    if pairs is None:
        return
    from harmoq_ao.common.progress import progress_bar
    from harmoq_ao.export.check import compare
    from harmoq_ao.runtime.upscaler import of_quantized

    with progress_bar() as progress:
        task = progress.add_task("Comparing", total=None)
        tables = compare(
            output, kind.value, of_quantized(quantized, model), found, pairs, multiple, lambda _: progress.advance(task)
        )
    out.print(_psnr_table({name: table.mean.psnr for name, table in tables.items()}, str(check)))


def _exported(
    quantized: QuantizedModel, output: Path, kind: Format, size: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, int, str | None]:
    """Write the file.

    Returns:
        The fixed size of its images or None, the number that their sides are multiples of, and a remark.
    """
    if kind in (Format.onnx, Format.openvino):
        write = harmoq_ao.export_onnx if kind is Format.onnx else harmoq_ao.export_openvino
        made = write(quantized, output, size)
        remark = None if size is not None or made.note is None else f"One size only: {made.note}"
        return made.size, made.multiple, remark
    if kind is Format.program:
        return harmoq_ao.export_program(quantized, output, size), 1, None
    harmoq_ao.export_checkpoint(quantized, output)
    return None, 1, "Weights are quantized. Activations are not: a float checkpoint has no place for their ranges."


def _free_text(multiple: int) -> str:
    return ", images of any size" if multiple == 1 else f", images with sides in multiples of {multiple}"


def _format(output: Path, given: Format | None) -> Format:
    known = {suffix: kind for kind, suffix in _SUFFIXES.items()}
    kind = given or known.get(output.suffix.lower())
    if kind is None:
        raise ConfigError(
            "The suffix of the output names no format",
            found=output.name,
            expected=", ".join(known),
            remedy="pass --format onnx, openvino, program or checkpoint",
        )
    for demanding in (Format.checkpoint, Format.openvino):  # whose readers go by the suffix
        suffix = _SUFFIXES[demanding]
        if kind is demanding and output.suffix.lower() != suffix:
            raise ConfigError(f"This format is written as {suffix}", found=output.name, expected=f"a {suffix} file")
    return kind


def _size(text: str | None, kind: Format) -> tuple[int, int] | None:
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if match is None or kind is Format.checkpoint:
        expected = "no --size: a checkpoint takes every size" if kind is Format.checkpoint else "128, or HEIGHTxWIDTH"
        raise ConfigError("The size is not usable", found=text, expected=expected)
    height = int(match[1])
    return height, int(match[2] or height)


def _check_output(output: Path, kind: Format, overwrite: bool) -> None:
    for path in (output, output.with_suffix(".bin")) if kind is Format.openvino else (output,):
        check_output_file(path)
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists already", remedy="pass --overwrite, or another name")


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _psnr_table(psnr: dict[str, float], folder: str) -> Table:
    table = Table(title=escape(folder), title_justify="left")
    for column in ("engine", "PSNR-Y dB", "difference"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    own = psnr["harmoq_ao"]
    for name, value in psnr.items():
        table.add_row(name, f"{value:.3f}", "" if name == "harmoq_ao" else f"{value - own:+.4f}")
    return table
