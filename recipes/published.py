"""Published networks that tables are made for by path: their authors' file names, and the layout such a file has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from harmoq_ao.recipes.cells import digest
from harmoq_ao.zoo import LoadedModel


class Published(NamedTuple):
    """A network whose weights its authors publish.

    Args:
        name: Architecture and scale.
        file: The authors' file name.
        layout: :func:`layout` of its parameters.
    """

    name: str
    file: str
    layout: str


PUBLISHED = (
    Published("SwinIR-light x2", "002_lightweightSR_DIV2K_s64w8_SwinIR-S_x2.pth", "68796bc150"),
    Published("SwinIR-light x3", "002_lightweightSR_DIV2K_s64w8_SwinIR-S_x3.pth", "02b8ec4cfe"),
    Published("SwinIR-light x4", "002_lightweightSR_DIV2K_s64w8_SwinIR-S_x4.pth", "6e04074257"),
    Published("HAT-S x2", "HAT-S_SRx2.pth", "2fd2f278ea"),
    Published("HAT-S x3", "HAT-S_SRx3.pth", "0f2892c5d0"),
    Published("HAT-S x4", "HAT-S_SRx4.pth", "c048e5cca2"),
    Published("CRAFT x4", "team34_craft.pth", "80c5548219"),
)
"""SwinIR and HAT by the releases of their repositories, CRAFT by that of the NTIRE 2024 challenge on efficient SR."""


def layout(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Ten hexadecimal digits that identify names and shapes of parameters, whatever their values and order."""
    return digest(sorted((name, list(tensor.shape)) for name, tensor in parameters))


def describe(loaded: LoadedModel) -> str:
    """Architecture, scale and layout of a loaded network, and which published one has that layout."""
    found = layout(loaded.model.named_parameters())
    known = next((f"that of {entry.name} as published" for entry in PUBLISHED if entry.layout == found), "")
    return f"{loaded.architecture} x{loaded.scale}, layout {found}" + (f", {known}" if known else "")


def help_text() -> str:
    """The table, for the help of a command."""
    rows = [f"  {entry.name:<16} {entry.file:<48} {entry.layout}" for entry in PUBLISHED]
    return "\n".join(["published networks for --checkpoint: file, and layout (digest of names and shapes)", *rows])
