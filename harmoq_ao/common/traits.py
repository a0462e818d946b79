"""What a model asks of its images, in one description: of a checkpoint, a prepared model, a saved one, an upscaler."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Tiling = Literal["supported", "discouraged", "internal"]
"""Whether tiles give what the whole image does: yes; no, as statistics are global; the model tiles by itself."""
TILINGS: tuple[str, ...] = get_args(Tiling)


@dataclass(frozen=True, kw_only=True)
class ImageTraits:
    """Image requirements of a model, and how it is called.

    Whatever describes a model derives from this class, and is made from another description by :meth:`image_traits`.

    Attributes:
        size_multiple: Sides of the input must be multiples of this (1: any size).
        size_minimum: Sides of the input must be at least this.
        square: The input must be square.
        tiling: `supported`, `discouraged` (global statistics: seams) or `internal` (the model tiles by itself).
        output: Which tensor of the output is the image, as a path of keys, attributes and indices joined by dots; None
            where the output is the image.
        keyword: Name under which the image is passed, where it cannot be passed by position.
    """

    size_multiple: int = 1
    size_minimum: int = 0
    square: bool = False
    tiling: Tiling = "supported"
    output: str | None = None
    keyword: str | None = None

    def image_traits(self) -> dict[str, Any]:
        """The attributes of this class alone, by name."""
        return {field.name: getattr(self, field.name) for field in fields(ImageTraits)}
