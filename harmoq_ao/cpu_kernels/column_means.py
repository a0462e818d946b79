"""Means over all pixels of an image, channel by channel, of pixels that are rows of a matrix, or of their squares."""

from __future__ import annotations

import torch
from torch import Tensor

from harmoq_ao.cpu_kernels import library


def column_means_reference(x: Tensor, first: int, columns: int, images: int, squares: bool = False) -> Tensor:
    """What :func:`column_means` computes, in plain torch."""
    part = x[:, first : first + columns].double().reshape(images, -1, columns)
    return (part.square() if squares else part).mean(1).float()


def column_means(x: Tensor, first: int, columns: int, images: int, squares: bool = False) -> Tensor:
    """Means of some columns over the rows of each image; the same for any number of threads.

    Args:
        x: `[images * tokens, width]` float32 or bfloat16; the row stride may exceed the width.
        first: First column.
        columns: How many.
        images: Images of the batch.
        squares: Whether the squares of the values are averaged.

    Returns:
        `[images, columns]` float32.

    Raises:
        RuntimeError: The arguments do not fit each other, or there are no CPU kernels.
    """
    means: Tensor = library.required().column_means(x, first, columns, images, squares)
    return means


def register_fakes(namespace: str) -> None:
    """Tell torch the shape of this file's operator in the namespace of an instruction set."""

    @torch.library.register_fake(f"{namespace}::column_means", allow_override=True)
    def _(x: Tensor, first: int, columns: int, images: int, squares: bool = False) -> Tensor:
        return x.new_empty(images, columns, dtype=torch.float32)
