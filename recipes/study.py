"""The engine of tables and figures: quantizes each cell once, measures it on benchmark sets, and resumes.

    OUTPUT/cells/ID.SET.json        scores of one cell on one set
    OUTPUT/states/ID.safetensors    parameters of the quantized model
    OUTPUT/states/ID.json           how it was made, written last: present means complete
    OUTPUT/pictures/ID.SET.IMAGE.png

An ID covers the cell, all settings that it reads, the float model, the photographs and the seed: whatever changes, the
cell is computed anew under another ID. Every file is written beside its place and renamed, so a killed run leaves
whole files only, and the same command continues with what is missing.

By default the model that is measured simulates quantization in float; with ``converted`` it computes on integers: the
same numbers up to the order of float additions. References (float, bicubic) are measured by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.baselines.bits_by_patch import BitsByPatch
from harmoq_ao.calibration.solve import disable_observers
from harmoq_ao.common.devices import device_named
from harmoq_ao.common.errors import DatasetError
from harmoq_ao.common.output import make_folder
from harmoq_ao.common.progress import progress_bar
from harmoq_ao.images import ImagePair, atomic_write, load_pairs
from harmoq_ao.images.metrics import bicubic_batch, to_uint8
from harmoq_ao.recipes.cells import BICUBIC, FLOAT, Cell, digest
from harmoq_ao.recipes.making import Photographs, files_digest, quantize, quantize_by_patch
from harmoq_ao.recipes.store import environment, read_json, read_state, restore_state, state_of, write_json, write_state
from harmoq_ao.runtime.evaluation import EvaluationTable, evaluate
from harmoq_ao.runtime.upscaler import Upscaler, of_loaded, of_quantized
from harmoq_ao.zoo import LoadedModel

Pixels = npt.NDArray[np.uint8]
Upscale = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StudySettings:
    """What all cells of a study share.

    Args:
        output: Folder of everything that is kept.
        benchmark: Folder of sets, each with ``HR`` and ``LR_bicubic/X2``.
        calibration: Folder of photographs, searched recursively.
        seed: Of the crops, the split of the photographs and the observers' samples.
        device: Where models run.
        converted: Measure the integer models instead of the simulations.
        tile: Side of a tile in input pixels; None takes each image whole.
    """

    output: Path
    benchmark: Path
    calibration: Path
    seed: int = 0
    device: str = "cpu"
    converted: bool = False
    tile: int | None = None


@dataclass(frozen=True)
class Result:
    """Scores of one cell on one set, with their provenance.

    Args:
        psnr_y: Mean over the images in dB.
        ssim_y: Mean over the images.
        images: ``psnr_y``, ``ssim_y`` and ``seconds`` by image.
        seconds_quantize: Time that making the model took; 0 for a reference and for one that is not kept.
        seconds_evaluate: Time that measuring took.
        measured: ``integer model``, ``simulation in float``, or empty for a reference.
        cell: The cell with all its settings.
        surroundings: Digests of the float model, the photographs and the benchmark, and the seed.
        environment: Versions and machine.
    """

    psnr_y: float
    ssim_y: float
    images: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds_quantize: float = 0.0
    seconds_evaluate: float = 0.0
    measured: str = ""
    cell: dict[str, Any] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """Scores by cell and set, and one sentence for each cell that could not be measured."""

    results: dict[tuple[Cell, str], Result] = field(default_factory=dict)
    failures: dict[Cell, str] = field(default_factory=dict)

    def get(self, cell: Cell, set_name: str) -> Result | None:
        """Scores of a cell, or None where it failed."""
        return self.results.get((cell, set_name))


@dataclass(frozen=True)
class PatchUpscale:
    """Upscales patch by patch, adjacent ones sharing half a side, with a network that chooses the bits of each.

    Args:
        upscaler: What its images must look like.
        network: Its model.
        side: Side of a patch in input pixels.
        device: Where it runs.
    """

    upscaler: Upscaler
    network: BitsByPatch
    side: int
    device: torch.device

    def __call__(self, image: Tensor) -> Tensor:
        """`[1, 3, H, W]` in 0..1."""
        return self.upscaler(image.to(self.device), tile=self.side, overlap=self.side // 2)


class Study:
    """Quantizes and measures cells, each once.

    Args:
        settings: What all cells share.
        load: The float model of a scale.
        console: For progress; standard error by default.

    Raises:
        ConfigError: There is no such device.
        OutputError: The output folder cannot be created.
        DatasetError: There are no photographs.
        CalibrationError: There is one photograph only: none would be left for the held-out crops.
    """

    def __init__(
        self, settings: StudySettings, load: Callable[[int], LoadedModel], console: Console | None = None
    ) -> None:
        self.settings = settings
        self.device = device_named(settings.device)
        self.console = console or Console(stderr=True)
        self.photographs = Photographs(settings.calibration, settings.seed)
        for kind in ("cells", "states", "pictures"):
            make_folder(settings.output / kind)
        self._load = load
        self._model = cache(self._loaded_with_digest)
        self._benchmark = cache(self._benchmark_digest)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def run(self, cells: Iterable[Cell], sets: Sequence[str]) -> Outcome:
        """Measure every cell on every set, taking from the output folder what is there.

        A cell that fails is reported, and the others run.

        Raises:
            DatasetError: A set is not there.
            CheckpointError: The float model cannot be loaded.
        """
        outcome, unique = Outcome(), list(dict.fromkeys(cells))
        for scale in dict.fromkeys(cell.scale for cell in unique):  # what is wrong for every cell ends the run
            self.loaded(scale)
            for name in sets:
                self._benchmark(scale, name)
        for number, cell in enumerate(unique, start=1):
            with self._reported(cell, outcome.failures):
                missing = [name for name in sets if not self._result_path(cell, name).is_file()]
                if missing:
                    self._say(f"[bold]{number}/{len(unique)}[/] {escape(cell.name)}: {', '.join(missing)}")
                    model = self.upscaler(cell)
                    for name in missing:
                        write_json(self._result_path(cell, name), asdict(self._measure(cell, model, name)))
                for name in sets:
                    outcome.results[cell, name] = Result(**read_json(self._result_path(cell, name)) or {})
        return outcome

    def models(self, cells: Mapping[str, Cell]) -> tuple[dict[str, h.PreparedModel], dict[Cell, str]]:
        """Quantized models by the names of their cells, and the reasons of those that failed."""
        found: dict[str, h.PreparedModel] = {}
        failures: dict[Cell, str] = {}
        for name, cell in cells.items():
            with self._reported(cell, failures):
                self._say(f"[bold]{len(found) + 1}/{len(cells)}[/] {escape(cell.name)}")
                found[name] = self.prepared(cell)
        return found, failures

    @contextmanager
    def _reported(self, cell: Cell, failures: dict[Cell, str]) -> Iterator[None]:
        """Context manager that turns any error into an entry of `failures`, with its traceback on the console."""
        try:
            yield
        except Exception as error:  # whatever it is, the other cells can still be done
            failures[cell] = f"{type(error).__name__}: {error}"
            if not isinstance(error, h.HarmoqError):
                self.console.print_exception()
            self._say(f"[bold red]failed[/] {escape(cell.name)}: {escape(failures[cell])}")

    def _measure(self, cell: Cell, model: Upscale, set_name: str) -> Result:
        start = time.perf_counter()
        if isinstance(model, PatchUpscale):
            model.network.used.clear()
        table = self._evaluate(cell, model, set_name)
        making = None if cell.is_reference else read_json(self._state_path(cell, "json"))
        return Result(
            psnr_y=table.mean.psnr,
            ssim_y=table.mean.ssim,
            images=table.to_dict()["images"],
            seconds_quantize=0.0 if making is None else making["seconds"],
            seconds_evaluate=round(time.perf_counter() - start, 3),
            measured=self._measured(cell, model),
            cell=cell.to_dict(),
            surroundings={**self._surroundings(cell), "benchmark": self._benchmark(cell.scale, set_name)},
            environment=environment(self.device),
        )

    def _measured(self, cell: Cell, model: Upscale) -> str:
        if cell.is_reference:
            return ""
        kind = "integer model" if self._variant(cell) else "simulation in float"
        if isinstance(model, PatchUpscale):
            return f"{kind} ({cell.name}: {model.network.mean_bits:.2f} bits of activations on average)"
        return kind

    def _evaluate(self, cell: Cell, model: Upscale, set_name: str) -> EvaluationTable:
        pairs = self.pairs(cell.scale, set_name)
        with progress_bar() as progress:
            task = progress.add_task(escape(f"{cell.name} on {set_name}"), total=len(pairs))
            return evaluate(model, pairs, cell.scale, on_image=lambda _: progress.advance(task))

    def pairs(self, scale: int, set_name: str) -> list[ImagePair]:
        """The images of a set.

        Raises:
            DatasetError: The set is not there, or its images do not pair up.
        """
        return load_pairs(self.settings.benchmark / set_name, None, scale)

    def pair(self, scale: int, set_name: str, image: str) -> ImagePair:
        """One image of a set by its name.

        Raises:
            DatasetError: There is no such image.
        """
        pairs = {pair.name: pair for pair in self.pairs(scale, set_name)}
        if image not in pairs:
            raise DatasetError(f"{set_name} has no such image", found=image, expected=", ".join(pairs))
        return pairs[image]

    def picture(self, cell: Cell, set_name: str, image: str) -> Pixels:
        """One image of a set as the cell upscales it, `[H, W, 3]`; kept as a PNG after the first time."""
        path = self._path("pictures", cell, f".{set_name}.{image}{self._variant(cell)}.png")
        if not path.is_file():
            low = self.pair(cell.scale, set_name, image).load()[0]
            upscaled = to_uint8(self.upscaler(cell)(low.pixels[None])[0].expand(3, -1, -1))
            with atomic_write(path) as file:
                Image.fromarray(upscaled).save(file, format="PNG")
        with Image.open(path) as stored:
            return np.asarray(stored.convert("RGB"))

    # --- models -------------------------------------------------------------------------------------------------------

    def upscaler(self, cell: Cell) -> Upscale:
        """The cell's model as a function of `[1, 3, H, W]`, quantized now unless it was before."""
        if cell.method == BICUBIC:
            return partial(bicubic_batch, scale=cell.scale)
        upscaler = of_loaded(self.loaded(cell.scale), cell.name)
        if cell.by_patch:  # calibrated by every run that has a set to measure: a minute, and no state to keep
            network = quantize_by_patch(cell, self.loaded(cell.scale), self.photographs, self.device)
            of_patches = replace(upscaler, model=network, output=None, keyword=None)
            return PatchUpscale(of_patches, network, self.settings.tile or cell.settings().crop_size, self.device)
        if cell.method != FLOAT:
            prepared = self.prepared(cell)
            upscaler = replace(upscaler, model=prepared)
            if self.settings.converted:
                upscaler = of_quantized(h.convert_harmoq(prepared), cell.name)
        return lambda image: upscaler(image.to(self.device), tile=self.settings.tile)

    def prepared(self, cell: Cell) -> h.PreparedModel:
        """The cell's quantized model: from the output folder, or made now and kept there."""
        making = read_json(self._state_path(cell, "json"))
        if making is not None:
            prepared = self.fresh(cell.scale, h.HarmoqConfig.from_dict(making["config"]))
            restore_state(prepared, read_state(self._state_path(cell, "safetensors")))
            return prepared
        start, checkpoint = time.perf_counter(), self._state_path(cell, "refining")
        made = quantize(cell, self.loaded(cell.scale), self.photographs, self.device, checkpoint)
        record = {
            "cell": cell.to_dict(),
            "surroundings": self._surroundings(cell),
            "config": made.prepared.config.to_dict(),
            "environment": environment(self.device),
            "seconds": round(time.perf_counter() - start, 3),
            "trace": made.trace,
        }
        write_state(self._state_path(cell, "safetensors"), state_of(made.prepared))
        write_json(self._state_path(cell, "json"), record)
        checkpoint.unlink(missing_ok=True)
        return made.prepared

    def trace(self, cell: Cell) -> dict[str, Any]:
        """Objectives and losses by stage from the making of a quantized model; empty where its method has none."""
        return (read_json(self._state_path(cell, "json")) or {}).get("trace") or {}

    def fresh(self, scale: int, config: h.HarmoqConfig) -> h.PreparedModel:
        """A prepared model with the float weights, observing nothing."""
        prepared = h.prepare_harmoq(self.loaded(scale), config)
        disable_observers(prepared)
        return prepared

    def loaded(self, scale: int) -> LoadedModel:
        """The float model of a scale, on the device."""
        return self._model(scale)[0]

    def _loaded_with_digest(self, scale: int) -> tuple[LoadedModel, str]:
        loaded, found = self._load(scale), sha256()
        for name, tensor in sorted(loaded.model.state_dict().items()):
            found.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        loaded.model.to(self.device)
        return loaded, found.hexdigest()[:16]

    # --- what identifies a cell ---------------------------------------------------------------------------------------

    def _surroundings(self, cell: Cell) -> dict[str, Any]:
        if cell.method == BICUBIC:
            return {}
        loaded, weights = self._model(cell.scale)
        model = {"architecture": loaded.architecture, "model": weights}
        if cell.method == FLOAT:
            return model
        return model | {"seed": self.settings.seed, "photographs": self.photographs.digest}

    def _benchmark_digest(self, scale: int, set_name: str) -> str:
        files = [file for pair in self.pairs(scale, set_name) for file in (pair.hr, pair.lr)]
        return files_digest(self.settings.benchmark, files)

    def _path(self, folder: str, cell: Cell, rest: str) -> Path:
        return self.settings.output / folder / f"{cell.identity(self._surroundings(cell))}{rest}"

    def _state_path(self, cell: Cell, suffix: str) -> Path:
        return self._path("states", cell, f".{suffix}")

    def _result_path(self, cell: Cell, set_name: str) -> Path:
        images = digest([self._benchmark(cell.scale, set_name), self.settings.tile])
        return self._path("cells", cell, f".{set_name}-{images}{self._variant(cell)}.json")

    def _variant(self, cell: Cell) -> str:
        return ".converted" if self.settings.converted and not (cell.is_reference or cell.by_patch) else ""

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
