"""A benchmark, photographs and a model small enough for whole studies in tests."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from harmoq_ao.images import load_image, skimage_photographs
from harmoq_ao.recipes.cells import Cell, Value
from harmoq_ao.recipes.study import Study, StudySettings
from harmoq_ao.zoo import LoadedModel
from tests.models import build

SCALE = 2
QUICK: dict[str, Value] = {
    "crops": 2,
    "crop_size": 16,
    "held_out": 1,
    "algorithm.updates": 1,
    "algorithm.images": 1,
    "algorithm.rows": 64,
    "refine.steps": 2,
    "refine.checks": 1,
    "refine.batch_size": 1,
    "refine.crop_size": None,
}
"""Options of a HarmoQ cell that takes a second."""


def photograph(name: str, side: int) -> Image.Image:
    """A square from the middle of one of scikit-image's photographs."""
    photographs = skimage_photographs("calibration") | skimage_photographs("evaluation")
    pixels = load_image(photographs[name]).to_uint8()
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))


def write_benchmark(root: Path, name: str = "Mini", images: tuple[str, ...] = ("astronaut", "chelsea")) -> Path:
    """A set of images of 40x40 pixels as `root/name/HR` and `root/name/LR_bicubic/X2`."""
    for folder in ("HR", "LR_bicubic/X2"):
        (root / name / folder).mkdir(parents=True)
    for image in images:
        high = photograph(image, 20 * SCALE)
        high.save(root / name / "HR" / f"{image}.png")
        low = high.resize((20, 20), Image.Resampling.BICUBIC)
        low.save(root / name / "LR_bicubic" / "X2" / f"{image}x2.png")
    return root


def write_photographs(folder: Path) -> Path:
    """Three photographs to calibrate on."""
    folder.mkdir(parents=True)
    for name in ("coffee", "rocket", "motorcycle_left"):
        photograph(name, 64).save(folder / f"{name}.png")
    return folder


@cache
def _weights() -> dict[str, torch.Tensor]:
    return build("SwinIR/light").state_dict()


def write_checkpoint(path: Path) -> Path:
    """The toy SwinIR as a file that spandrel knows."""
    torch.save(_weights(), path)
    return path


class TwoLinears(nn.Module):
    """Nearest-neighbour upscaling and a small correction, pixel by pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 16)
        self.two = nn.Linear(16, 3)

    def forward(self, image: Tensor) -> Tensor:
        up = F.interpolate(image, scale_factor=float(SCALE))
        result: Tensor = up + 0.2 * self.two(torch.tanh(self.one(up.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return result


def load_linears(scale: int = SCALE) -> LoadedModel:
    """Two linear layers: all that the engine needs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LoadedModel(TwoLinears().eval(), "TwoLinears", SCALE, 3, 3)


class Block(nn.Module):
    """Attention among 16 tokens, then a perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)
        result: Tensor = x + self.fc2(F.gelu(self.fc1(x)))
        return result


class TinyTransformer(nn.Module):
    """Nearest-neighbour upscaling, corrected by three blocks on windows of 4x4 pixels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.tail = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        batch, width, height, columns = x.shape
        x = x.reshape(batch, width, height // 4, 4, columns // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, width)
        for block in self.blocks:
            x = block(x)
        x = x.reshape(batch, height // 4, columns // 4, 4, 4, width).permute(0, 5, 1, 3, 2, 4)
        correction = self.tail(x.reshape(batch, width, height, columns))
        up = F.interpolate(image, scale_factor=float(SCALE))
        return up + 0.1 * torch.tanh(F.pixel_shuffle(correction, SCALE))


def load_transformer(scale: int = SCALE) -> LoadedModel:
    """A transformer for figures that look at its layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LoadedModel(TinyTransformer().eval(), "TinyTransformer", SCALE, 3, 3, size_multiple=4)


def write_inputs(folder: Path) -> None:
    """Benchmark and photographs below a folder, unless they are there."""
    if not (folder / "sets").exists():
        write_benchmark(folder / "sets")
        write_photographs(folder / "photographs")


def run_command(main: Callable[..., int], folder: Path, *arguments: str, expected: int = 0) -> str:
    """What a command of a quick study prints; it writes to `folder/out`, which is the working directory."""
    write_inputs(folder)
    common = ["--output", "out", "--benchmark", "sets", "--calibration", "photographs", "--sets", "Mini"]
    common += ["--preset", "fast", *(f"--set={name}={json.dumps(value)}" for name, value in QUICK.items())]
    text = io.StringIO()
    assert main([arguments[0], *common, *arguments[1:]], Console(file=text, width=200)) == expected
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV as text."""
    with path.open() as file:
        return list(csv.DictReader(file))


def tiny_study(folder: Path, load: Callable[[int], LoadedModel] = load_linears, **settings: Any) -> Study:
    """A study below a folder; its benchmark and photographs are made at the first call."""
    write_inputs(folder)
    given = StudySettings(folder / "out", folder / "sets", folder / "photographs", **settings)
    return Study(given, load)


def quick_cell(method: str, bits: int = 4, **options: Value) -> Cell:
    """A cell that takes a second or two."""
    chosen = QUICK if method == "harmoq" else {k: v for k, v in QUICK.items() if "." not in k}
    return Cell(method, bits, bits, SCALE, preset="fast").with_options({**chosen, **options})
