"""The API reference `docs/api.md`, from the docstrings.

::

    python -m harmoq_ao.recipes.api_reference docs/api.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import griffe
from griffe2md import ConfigDict, render_object_docs  # type: ignore[import-untyped]

import harmoq_ao
from harmoq_ao.common.output import atomic_write

FURTHER = (
    "errors.HarmoqError",
    "harmonize.apply.harmonize",
    "harmonize.refine.RefineSettings",
    "methods.prepare_with",
    "mixed_precision.mix_bits",
    "mixed_precision.Mixture",
    "data.crops.CalibrationCrops",
    "evaluation.evaluate",
    "upscaler.Upscaler",
    "data.reading.load_image",
    "data.writing.save_image",
    "data.writing.save_rows",
    "lowering.compiled.compile_model",
    "lowering.openvino.lower_openvino",
    "lowering.fixed_size.fixed_size",
    "harmonize.algorithm.AlgorithmSettings",
    "allocator.keep_memory",
)
"""Public objects that are not names of the package itself, in the order of use."""

_HEADER = """# API reference

Made from the docstrings by `python -m harmoq_ao.recipes.api_reference docs/api.md`. Shapes are `[B, C, H, W]`, images
are float in 0..1, errors are subtypes of `HarmoqError`.

"""
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")
_CODE = re.compile(r"<code>(.*?)</code>")
_FIELDS = re.compile(r"\n\*\*Attributes:\*\*\n\n(- .*\n)+")
_FIELD = re.compile(r"#### `[\w.]+`\n\n```python\n\w+: .*\n```\n\n(?=#|\Z)")  # a property has a docstring below
_LINK = re.compile(r"\[([^\[\]]+)\]\(#([\w.]+)\)")


def reference_text() -> str:
    """The whole page as Markdown."""
    package = griffe.load("harmoq_ao", docstring_parser="google")
    config = ConfigDict(docstring_style="google", heading_level=3, show_root_full_path=False, show_submodules=False)
    names = [name for name in harmoq_ao.__all__ if name != "HarmoqError"]
    pages = [render_object_docs(_resolved(package[name]), config) for name in names]
    further = [render_object_docs(_resolved(package[name]), config) for name in FURTHER]
    body = "\n".join(("## `harmoq_ao`\n", *pages, "## Further\n", *further))
    return _HEADER + _plain(body)


def _resolved(found: griffe.Object | griffe.Alias) -> griffe.Object:
    return found.final_target if isinstance(found, griffe.Alias) else found


def _plain(text: str) -> str:
    """Roles and links as plain names, fields of data classes said once, no more than one empty line."""
    text = _ROLE.sub(r"`\1`", text)
    text = _CODE.sub(lambda found: "`" + _LINK.sub(r"\1", found[1]) + "`", text)
    text = _FIELDS.sub("\n", _LINK.sub(r"\1", text))
    text = _FIELD.sub("", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def main(arguments: list[str]) -> None:
    """Write the page to the file named."""
    with atomic_write(Path(arguments[0])) as file:
        file.write(reference_text().encode())


if __name__ == "__main__":
    main(sys.argv[1:])
