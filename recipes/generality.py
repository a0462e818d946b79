"""Whether HarmoQ's presets hold on architectures that nothing was tuned on: a nightly check.

    python -m harmoq_ao.recipes.generality --output nightly
    python -m harmoq_ao.recipes.generality --output nightly --images PHOTOGRAPHS --device cuda

Small instances of the coverage table's architectures, from random weights, learn to upscale by two. Each is quantized
by DOBI and by every preset, converted, and compared with its float network on photographs that neither has seen. A
float network no better than bicubic, or a preset that ends below DOBI, makes the command end with 1. Every network and
every quantized model is measured once: what is in the output folder is not computed again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common.devices import device_named
from harmoq_ao.common.errors import ConfigError, DatasetError
from harmoq_ao.common.progress import track
from harmoq_ao.harmonization.presets import PRESETS, preset
from harmoq_ao.images import list_images
from harmoq_ao.images.metrics import bicubic_batch
from harmoq_ao.images.photographs import skimage_photographs, split_photographs
from harmoq_ao.recipes.architectures import ARCHITECTURES, Architecture, forward
from harmoq_ao.recipes.making import files_digest
from harmoq_ao.recipes.options import guarded
from harmoq_ao.recipes.store import read_json, read_state, write_json, write_state, write_text
from harmoq_ao.runtime.per_size import check_count

SCALE = 2
BASELINE = "dobi"
DEFAULT = ("SwinIR/light", "HAT", "CRAFT")
SIDE = 32
"""Side of the images that are learned from, in low-resolution pixels."""
BATCH = 8
RATE = 2e-3
EVALUATED = 12
"""Crops of 64 x 64 that everything is compared on."""
_BY_NAME = {entry.name: entry for entry in ARCHITECTURES}


@dataclass(frozen=True)
class Settings:
    """What all records of an output folder share.

    Args:
        images: Digest of the photographs.
        steps: Training steps of the float networks.
        pairs: Pairs of crops they are trained on.
        seed: Of weights, crops and refinement.

    Raises:
        ConfigError: There is nothing to train on, or no step.
    """

    images: str
    steps: int
    pairs: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "pairs"):
            check_count(name, getattr(self, name))


@dataclass(frozen=True)
class Split:
    """Photographs: to learn and calibrate on, to choose states by, and to compare on. No one is in two of them."""

    learned: list[Path]
    held_out: list[Path]
    compared: list[Path]

    @classmethod
    def of(cls, folder: Path | None, seed: int) -> Split:
        """Of a folder, a tenth each for the second and the third; by default the photographs of scikit-image.

        Raises:
            DatasetError: There are fewer than three photographs.
        """
        if folder is None:
            rest, compared = (list(skimage_photographs(kind).values()) for kind in ("calibration", "evaluation"))
        else:
            rest, compared = split_photographs(list_images(folder, recursive=True), seed)
        learned, held_out = split_photographs(rest, seed)
        if not (learned and held_out and compared):
            found = f"{len(rest) + len(compared)} in {folder}"
            raise DatasetError("Too few photographs", found=found, expected="at least three")
        return cls(learned, held_out, compared)

    def digest(self) -> str:
        """It changes when a photograph does."""
        files = [*self.learned, *self.held_out, *self.compared]
        return files_digest(Path(files[0].anchor), [file.resolve() for file in files])


class Upscaling(nn.Module):
    """An architecture that adds to the bicubic image what that lacks, which is learned in minutes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` in 0..1 to `[B, 3, 2H, 2W]`."""
        corrected: Tensor = self.body(image) + bicubic(image)
        return corrected


def bicubic(image: Tensor) -> Tensor:
    """`[B, C, H, W]` to twice the sides."""
    return F.interpolate(image, scale_factor=SCALE, mode="bicubic", align_corners=False)


class Nightly:
    """The check, with everything that is measured kept in a folder.

    Args:
        output: The folder.
        split: The photographs.
        settings: What all records share.
        device: Where to compute.

    Raises:
        ConfigError: There is no such device, or the folder holds records of other settings.
    """

    def __init__(self, output: Path, split: Split, settings: Settings, device: str) -> None:
        self.output, self.split, self.settings, self.device = output, split, settings, device_named(device)
        found, wanted = read_json(output / "settings.json"), asdict(settings)
        if found is not None and found != wanted:
            raise ConfigError(
                "The output folder holds results of other settings",
                found=found,
                expected=wanted,
                remedy="choose another folder, or the settings of before",
            )
        write_json(output / "settings.json", wanted)

    @cached_property
    def comparison(self) -> tuple[Tensor, Tensor]:
        """Low-resolution crops `[n, 3, 64, 64]` and the photographs they were made from."""
        crops = h.CalibrationCrops(self.split.compared, 64, EVALUATED, SCALE, self.settings.seed)
        return torch.stack(list(crops)), torch.stack([crops.reference(i) for i in range(EVALUATED)])

    def network(self, entry: Architecture) -> Upscaling:
        """The float network of an architecture, trained if it is not there.

        Raises:
            ConfigError: The architecture does not upscale by two.
        """
        model = Upscaling(_checked(entry, entry.build(self.settings.seed))).to(self.device)
        path = self._folder(entry) / "float.safetensors"
        if path.is_file():
            model.load_state_dict(read_state(path))
        else:
            train(model, *self._pairs(), self.settings.steps, self.settings.seed, f"Training {entry.name}")
            write_json(path.with_suffix(".json"), self._float_scores(model))
            write_state(path, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
        return model.eval()

    def scores(self, entry: Architecture) -> dict[str, float]:
        """PSNR in dB of the float network and of bicubic upscaling to the photographs."""
        return read_json(self._folder(entry) / "float.json") or self._float_scores(self.network(entry))

    def fidelity(self, entry: Architecture, model: Upscaling, bits: int, method: str) -> float:
        """PSNR in dB of the converted model to its float network, quantized and measured if it is not there.

        Args:
            entry: The architecture.
            model: Its float network.
            bits: Of weights and activations.
            method: `dobi`, or a preset of HarmoQ.
        """
        path = self._folder(entry) / f"W{bits}A{bits}-{method}.json"
        found = read_json(path)
        if found is None:
            found = {"fidelity": psnr(self._upscaled(self._quantized(model, bits, method)), self._upscaled(model))}
            write_json(path, found)
        return float(found["fidelity"])

    def _quantized(self, model: Upscaling, bits: int, method: str) -> h.QuantizedModel:
        settings, seed = preset("none" if method == BASELINE else method), self.settings.seed
        cut = [
            list(h.CalibrationCrops(files, settings.crop_size, count, SCALE, seed))
            for files, count in ((self.split.learned, settings.crops), (self.split.held_out, settings.held_out))
        ]
        crops, held_out = ([crop.to(self.device) for crop in crops] for crops in cut)
        config = h.HarmoqConfig(bits, bits, profile="paper", seed=seed)
        name, work = (BASELINE, "none") if method == BASELINE else ("harmoq", method)
        return h.convert_harmoq(h.prepare_with(name, model, crops, config, preset=work, held_out=held_out))

    @torch.no_grad()
    def _upscaled(self, model: nn.Module) -> Tensor:
        images = self.comparison[0]
        return torch.cat([model(image[None].to(self.device)).float().cpu() for image in images])

    def _float_scores(self, model: Upscaling) -> dict[str, float]:
        images, photographs = self.comparison
        return {
            "float": psnr(self._upscaled(model.eval()), photographs),
            "bicubic": psnr(bicubic_batch(images, SCALE), photographs),
        }

    def _pairs(self) -> tuple[Tensor, Tensor]:
        count = self.settings.pairs
        crops = h.CalibrationCrops(self.split.learned, SIDE, count, SCALE, self.settings.seed)
        pairs = [(crops[index], crops.reference(index)) for index in range(count)]
        low, high = (torch.stack(side).to(self.device) for side in zip(*pairs, strict=True))
        return low, high

    def _folder(self, entry: Architecture) -> Path:
        return self.output / entry.name.replace("/", "-")


def _checked(entry: Architecture, body: nn.Module) -> nn.Module:
    image = entry.example()
    found, expected = tuple(forward(body, image).shape), tuple(bicubic(image).shape)
    if found != expected:
        raise ConfigError(f"{entry.name} does not upscale by two", found=found, expected=expected)
    return body


def train(model: nn.Module, low: Tensor, high: Tensor, steps: int, seed: int, title: str) -> None:
    """Adam on the mean absolute error, its rate falling along a cosine.

    Args:
        model: Changed in place.
        low: Images `[n, 3, S, S]`.
        high: What they were made from, `[n, 3, 2S, 2S]`.
        steps: Steps of :data:`BATCH` images.
        seed: Of their order.
        title: For the progress bar.
    """
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randint(len(low), (steps, BATCH), generator=torch.Generator().manual_seed(seed))
    for chosen in track(list(order), title):
        index = chosen.to(low.device)
        optimizer.zero_grad()
        F.l1_loss(model(low[index]), high[index]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def psnr(found: Tensor, expected: Tensor) -> float:
    """Mean over images `[n, C, H, W]` of the PSNR in dB, both clamped to 0..1."""
    errors = (found.clamp(0, 1) - expected.clamp(0, 1)).double().square().mean((1, 2, 3)).clamp_min(1e-12)
    return float((-10.0 * errors.log10()).mean())


def check(
    nightly: Nightly, entries: Sequence[Architecture], bits: Sequence[int], presets: Sequence[str]
) -> tuple[str, list[str]]:
    """Measure everything; the table as Markdown, and one sentence for each expectation that was not met.

    Each line of the table is printed as soon as it is known.
    """
    console = Console(stderr=True)
    titles = ["architecture", "bicubic", "float", "bits", "DOBI", *presets]
    lines, failures = [f"| {' | '.join(titles)} |", "|---" + "|--:" * (len(titles) - 1) + "|"], []
    for entry in entries:
        model, scores = nightly.network(entry), nightly.scores(entry)
        if scores["float"] <= scores["bicubic"]:
            failures.append(f"{entry.name} in float is no better than bicubic upscaling")
        for width in bits:
            least, *reached = (nightly.fidelity(entry, model, width, method) for method in (BASELINE, *presets))
            failures += [
                f"{entry.name} W{width}A{width}: {name} ends at {value:.2f} dB, DOBI at {least:.2f} dB"
                for name, value in zip(presets, reached, strict=True)
                if value < least
            ]
            numbers = [f"{value:.2f}" for value in (scores["bicubic"], scores["float"])]
            row = [entry.name, *numbers, f"W{width}A{width}", *(f"{value:.2f}" for value in (least, *reached))]
            lines.append(f"| {' | '.join(row)} |")
            console.print(lines[-1], highlight=False, markup=False, soft_wrap=True)
    return "\n".join(lines) + "\n", failures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)

    def run() -> bool:
        split = Split.of(options.images, options.seed)
        settings = Settings(split.digest(), options.steps, options.pairs, options.seed)
        nightly = Nightly(options.output, split, settings, options.device)
        entries = [_BY_NAME[name] for name in options.architectures]
        table, failures = check(nightly, entries, options.bits, options.presets)
        verdict = "".join(f"\n- {failure}" for failure in failures) or "\nEverything as expected."
        text = f"PSNR in dB: of bicubic and float to photographs, of the others to float.\n\n{table}{verdict}\n"
        write_text(options.output / "generality.md", text)
        Console(stderr=True).print(text, highlight=False, markup=False)
        return not failures

    return guarded(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare the presets with DOBI on architectures trained on the spot.")
    add: Any = parser.add_argument
    add("--output", type=Path, required=True, help="folder of results; what is there is not computed again")
    add("--images", type=Path, help="folder of photographs (default: those of scikit-image)")
    add("--architectures", nargs="+", choices=list(_BY_NAME), default=list(DEFAULT), metavar="NAME")
    add("--bits", nargs="+", type=int, choices=range(2, 9), default=[4, 2])
    add("--presets", nargs="+", choices=list(PRESETS), default=["algorithm", "fast", "standard"])
    add("--steps", type=int, default=3000, help="training steps of a float network")
    add("--pairs", type=int, default=1024, help="pairs of crops it is trained on")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda")
    return parser


if __name__ == "__main__":
    sys.exit(main())
