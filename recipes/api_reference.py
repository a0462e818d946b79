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
from harmoq_ao.common.output import atomic_write, make_folder

SECTIONS = {
    "Images": "CalibrationCrops find_images from_hf_dataset load_image load_pairs save_image",
    "Configuration": "HarmoqConfig SiteRule",
    "Float models": "load_model load_demo_model",
    "1. Preparation": "prepare_harmoq PreparedModel Report SiteRow",
    "2. Calibration": "calibrate compute_qparams enable_fake_quant disable_fake_quant",
    "3. Harmonization": "harmonize HarmonizeSettings PRESETS AlgorithmSettings RefineSettings HarmonizeTrace",
    "4. Conversion": "convert_harmoq QuantizedModel save_quantized load_quantized",
    "Running and measuring": "Upscaler compile_model lower_openvino evaluate psnr_y ssim_y",
    "Other methods": "prepare_with METHODS BASELINES mix_bits",
    "Export and report": "export_onnx export_program export_checkpoint write_report",
}
"""Public names in the order of the pipeline; errors and whatever is not named here come last."""

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
    sections = {title: names.split() for title, names in SECTIONS.items()}
    named = {name for names in sections.values() for name in names}
    sections["Errors and the rest"] = [name for name in harmoq_ao.__all__ if name not in named and name[0] != "_"]
    parts = []
    for title, names in sections.items():
        found = [package[name] for name in names]
        targets = [item.final_target if isinstance(item, griffe.Alias) else item for item in found]
        parts += [f"## {title}\n", *(render_object_docs(target, config) for target in targets)]
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
    path = Path(arguments[0])
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(reference_text().encode())


if __name__ == "__main__":
    main(sys.argv[1:])
