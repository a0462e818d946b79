"""A quantized model with names nobody should trust, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.conversion.save import folder_bytes, save_quantized
from harmoq_ao.images import image_from_array
from harmoq_ao.reporting import Scene, Source, write_report
from harmoq_ao.runtime.upscaler import Upscaler, of_quantized
from harmoq_ao.sites.history import History, SiteChange
from tests.models import build, converted

PAPER = HarmoqConfig(4, 4, "paper")
HOSTILE = "<script>alert(1)</script>\" onerror='x' & ü.png"


def picture(height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random `[H, W, 3]` in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine[0].movedim(0, -1)


def source(name: str = "first", seed: int = 0, high: bool = True) -> Source:
    """An image of 24x32 pixels with an original."""
    low = image_from_array(picture(seed=seed).numpy())
    return Source(name, low, image_from_array(picture(48, 64, seed).numpy()) if high else None)


def history() -> History:
    """Everything a history can hold."""
    names = [row.name for row in converted("SwinIR/light", PAPER).report().quantized]
    sites = tuple(SiteChange(name, 0.1, 0.05 + 0.001 * i, 0.01 + 0.002 * i, 0.02) for i, name in enumerate(names))
    losses = tuple((step, 1.0 / step) for step in range(1, 20))
    return History("harmoq", "fast", sites, losses, ((0, 30.0), (10, 32.0), (19, 31.5)), 10)


def quantized_model() -> QuantizedModel:
    """A tiny SwinIR in integers; one of its names is hostile."""
    model = converted("SwinIR/light", PAPER)
    model.history = history()
    next(row for row in model.rows if not row.quantized).name = HOSTILE
    return model


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Two pictures, one of a hostile name, against the float model."""
    model = quantized_model()
    folder = save_quantized(model, tmp_path_factory.mktemp("saved") / "m")
    upscaler = of_quantized(model, f"{folder.parent}/<b>bold</b>")
    reference = Upscaler(build("SwinIR/light"), "float", upscaler.scale, size_multiple=upscaler.size_multiple)
    return Scene(upscaler, folder_bytes(folder), [source(), source(HOSTILE, 1)], reference)


@pytest.fixture(scope="session")
def page(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of :func:`scene`."""
    return write_report(scene, tmp_path_factory.mktemp("page") / "report.html")
