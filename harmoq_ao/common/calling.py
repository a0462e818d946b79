"""How an author's model takes its image: by position, or by a name alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from torch import nn

from harmoq_ao.common.errors import InputError

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL)


@dataclass(frozen=True)
class ImageParameter:
    """The parameter of a forward that takes the image.

    Args:
        name: As its author calls it.
        by_name: It cannot be given by position.
    """

    name: str
    by_name: bool

    @property
    def keyword(self) -> str | None:
        """The name, where it has to be given."""
        return self.name if self.by_name else None


def image_parameter(cls: type[nn.Module]) -> ImageParameter:
    """The parameter that takes the image: the first one, or of keyword-only ones the one without a default.

    Raises:
        InputError: There is none, or several have to be given.
    """
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    if positional:
        return ImageParameter(positional[0].name, False)
    named = [p for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    needed = [p for p in named if p.default is Parameter.empty] or named[:1]
    if len(needed) == 1:
        return ImageParameter(needed[0].name, True)
    if not needed and parameters:  # **kwargs alone
        return ImageParameter("image", False)
    raise InputError(
        f"{cls.__name__}.forward does not take one image",
        found=f"({', '.join(map(str, parameters))})",
        expected="one argument without a default",
        remedy="wrap the model in a module whose forward takes the image",
    )


def call_with_image(model: Any, keyword: str | None, image: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a model with its image, by position or under `keyword`."""
    return model(image, *args, **kwargs) if keyword is None else model(*args, **{keyword: image}, **kwargs)
