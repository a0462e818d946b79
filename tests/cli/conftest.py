"""A float checkpoint, photographs, a benchmark and a quantized model."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
from PIL import Image

from tests.cli.command import QUICK, photograph, succeeds
from tests.models import BY_NAME


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.safetensors`, `photographs`, the benchmark `set`, and the quantized model `w4`."""
    root = tmp_path_factory.mktemp("cli")
    state = dict(BY_NAME["SwinIR/light"].build().state_dict())
    safetensors.torch.save_file(state, root / "model.safetensors")
    for index in range(2):
        photograph(root / "photographs" / f"{index}.png", seed=index)
        high = photograph(root / "set" / "HR" / f"{index}.png", seed=index)
        low = root / "set" / "LR_bicubic" / "X2" / f"{index}x2.png"
        low.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(high) as image:
            image.resize((24, 20), Image.Resampling.BICUBIC).save(low)
    succeeds("quantize", root / "model.safetensors", root / "w4", "--calibration", root / "photographs", *QUICK)
    return root
