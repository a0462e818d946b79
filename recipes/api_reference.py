"""The API reference, built from the docstrings: `make docs` writes build/docs/api.md.

::

    python -m harmoq_ao.recipes.api_reference build/docs/api.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import griffe
from griffe2md import ConfigDict, render_object_docs  # type: ignore[import-untyped]

import harmoq_ao
from harmoq_ao.recipes.store import write_text

_ROOM = re.compile(r"^``(\w+)`` +(?:\d\. )?(.*)$", re.MULTILINE)
"""A row of the table in the docstring of :mod:`harmoq_ao`, whose rooms follow the pipeline."""

_HEADER = """# API reference

Built from the docstrings by `make docs`. Shapes are `[B, C, H, W]`, images are float in 0..1, errors are subtypes of
`HarmoqError`.

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
    public = [package[name] for name in harmoq_ao.__all__ if name != "__version__"]
    common, *rooms = _ROOM.findall(harmoq_ao.__doc__ or "")
    parts = []
    for room, subject in (*rooms, common):
        targets = [item.final_target for item in public if item.target_path.split(".")[1] == room]
        if targets:
            parts += [f"## {room.capitalize()}: {subject}\n", *(render_object_docs(t, config) for t in targets)]
    return _HEADER + _plain("\n".join(parts))


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
    write_text(Path(arguments[0]), reference_text())


if __name__ == "__main__":
    main(sys.argv[1:])
