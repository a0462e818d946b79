"""Choices that the command line offers by name. Imports no third-party package, so that help texts cost nothing."""

from __future__ import annotations

from enum import StrEnum

METHODS = (
    "harmoq",
    "minmax",
    "percentile",
    "dobi",
    "2dquant",
    "condiquant",
    "brecq",
    "pams",
    "dbdc-pac",
    "granular-dq",
)
"""Quantization methods: HarmoQ, then the baselines in the order of the tables."""

PRESET_NAMES = ("none", "algorithm", "fast", "tables", "standard", "long", "best")
"""Names of the presets of harmonization."""


class Runtime(StrEnum):
    """What runs a quantized model."""

    torch = "torch"
    compiled = "torch.compile"
    openvino = "OpenVINO"


FIXED_TILE = 128
"""Default side of the tiles for torch.compile and OpenVINO, which compile every image size anew and need memory for it.
Smaller images are mirrored up to it."""
