"""A quantized model as a `torch.export` program: one `.pt2` file that runs wherever `harmoq_ao` is installed."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from harmoq_ao.common.errors import HarmoqError
from harmoq_ao.common.output import atomic_write
from harmoq_ao.common.version import __version__
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.export.validation import RUN_IT_HERE, UNTRACEABLE, check_exportable, example_for, failed


def export_program(quantized: QuantizedModel, path: str | Path, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Write the program of a quantized model for images of one size.

    Args:
        quantized: From :func:`convert_harmoq` or a saved model; left as it is.
        path: The file, replaced if it is there.
        size: Height and width of the images; 128 x 128, or what the model takes next to it, by default.

    Returns:
        Height and width.

    Raises:
        ExportError: The model does not take images of this size, or torch.export cannot take the model.
        OutputError: The file cannot be written.
    """
    check_exportable(quantized)
    image = example_for(quantized, size)
    file = io.BytesIO()
    try:
        with torch.no_grad():
            quantized(image)  # makes the graphs of islands for this size, which an export cannot
            program = torch.export.export(quantized, (image,), strict=False)
        torch.export.save(program, file, extra_files={"harmoq_ao": __version__})
    except HarmoqError:
        raise
    except Exception as error:  # an author's forward may fail under export in any way
        raise failed(UNTRACEABLE, error, place=f"{tuple(image.shape)}: ", remedy=RUN_IT_HERE) from error
    with atomic_write(path) as target:
        target.write(file.getvalue())
    return image.shape[-2], image.shape[-1]


def load_program(path: str | Path) -> torch.nn.Module:
    """The module of a program; call it with an image batch of the size it was exported at.

    Raises:
        ExportError: The file is not a program.
    """
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # a damaged archive may raise anything
        expected = "a .pt2 file from harmoq export --format program"
        raise failed(f"{path} cannot be read as a torch.export program", error, expected=expected) from error
    return program.module()
