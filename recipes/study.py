"""The engine of tables and figures: quantize a cell once, measure it on benchmark sets, keep everything, resume.

The model that is measured simulates quantization in float (or, with ``converted``, computes on integers: the same
numbers up to the order of float additions). All crops come from one folder of photographs; the held-out crops from
photographs that are not calibrated on. References (float, bicubic) are measured by the same code.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from harmoq_ao.calibration.calibrate import disable_observers
from harmoq_ao.common.errors import DatasetError
from harmoq_ao.common.progress import progress_bar
from harmoq_ao.harmonization.reference import float_reference
from harmoq_ao.images import ImagePair, atomic_write, load_pairs
from harmoq_ao.images.metrics import bicubic_batch, to_uint8
from harmoq_ao.recipes.cells import BICUBIC, FLOAT, Cell
from harmoq_ao.recipes.making import Photographs, files_digest, plain_settings, quantize
from harmoq_ao.recipes.store import Result, Store, environment, restore_state, state_of
from harmoq_ao.runtime.evaluation import EvaluationTable, evaluate
from harmoq_ao.runtime.upscaler import of_loaded, of_quantized
from harmoq_ao.zoo import LoadedModel

Pixels = npt.NDArray[np.uint8]
Upscale = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StudySettings:
    """What all cells of a study share.

    Args:
        output: Folder of everything that is kept; see `store.py`.
        benchmark: Folder of sets, each with ``HR`` and ``LR_bicubic/X2``.
        calibration: Folder of photographs, searched with its subfolders.
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


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        results: Scores by cell and set.
        failures: One sentence for each cell that could not be measured.
    """

    results: dict[tuple[Cell, str], Result] = field(default_factory=dict)
    failures: dict[Cell, str] = field(default_factory=dict)

    def get(self, cell: Cell, set_name: str) -> Result | None:
        """Scores of a cell, or None where it failed."""
        return self.results.get((cell, set_name))


class Study:
    """Quantizes and measures cells, each once.

    Args:
        settings: What all cells share.
        load: The float model of a scale.
        console: For progress; standard error by default.

    Raises:
        OutputError: The output folder cannot be created.
        DatasetError: There are no photographs.
        CalibrationError: There is one photograph only: none would be left for the held-out crops.
    """

    def __init__(
        self, settings: StudySettings, load: Callable[[int], LoadedModel], console: Console | None = None
    ) -> None:
        self.settings = settings
        self.console = console or Console(stderr=True)
        self.photographs = Photographs(settings.calibration, settings.seed)
        self.store = Store(settings.output)
        self._load = load
        self._models: dict[int, tuple[LoadedModel, str]] = {}
        self._photographs_digest = self.photographs.digest()
        self._benchmarks: dict[tuple[int, str], str] = {}

    # --- measuring ----------------------------------------------------------------------------------------------------

    def run(self, cells: Iterable[Cell], sets: Sequence[str]) -> Outcome:
        """Measure every cell on every set, taking from the output folder what is there.

        A cell that fails is recorded, and the others run. Nothing finished is lost when the run is killed.

        Raises:
            DatasetError: A set is not there.
            CheckpointError: The float model cannot be loaded.
        """
        outcome, unique = Outcome(), list(dict.fromkeys(cells))
        for scale in dict.fromkeys(cell.scale for cell in unique):  # what is wrong for every cell ends the run
            self.loaded(scale)
            for name in sets:
                self._benchmark(scale, name)

        def measure(cell: Cell, counter: str) -> None:
            outcome.results |= self._run_cell(cell, sets, counter)

        outcome.failures = self.attempt(unique, measure)
        return outcome

    def attempt(self, cells: Iterable[Cell], action: Callable[[Cell, str], None]) -> dict[Cell, str]:
        """Do something with each cell; one that fails is recorded, and the others have their turn.

        Args:
            cells: The cells.
            action: Takes a cell and a counter such as ``2/7``.

        Returns:
            Reasons of the failures.
        """
        unique, failures = list(dict.fromkeys(cells)), {}
        for number, cell in enumerate(unique, start=1):
            try:
                action(cell, f"{number}/{len(unique)}")
                self.store.forget_failure(self.identity(cell))
            except Exception as error:  # whatever it is, the other cells can still be done
                failures[cell] = f"{type(error).__name__}: {error}"
                text = "".join(traceback.format_exception(error))
                record = {"cell": cell.to_dict(), "reason": failures[cell], "traceback": text}
                self.store.keep_failure(self.identity(cell), record)
        for cell, reason in failures.items():
            self._say(f"[bold red]failed[/] {escape(cell.name)}: {escape(reason)}")
        return failures

    def _run_cell(self, cell: Cell, sets: Sequence[str], counter: str) -> dict[tuple[Cell, str], Result]:
        found = {name: self.result(cell, name) for name in sets}
        missing = [name for name, result in found.items() if result is None]
        if missing:
            self._say(f"[bold]{counter}[/] {escape(cell.name)}: {', '.join(missing)}")
            model = self.upscaler(cell)
            for name in missing:
                self._measure(cell, model, name)
        results = {(cell, name): found[name] or self.result(cell, name) for name in sets}
        return {key: result for key, result in results.items() if result is not None}

    def result(self, cell: Cell, set_name: str) -> Result | None:
        """What was measured before, with the same settings on the same images, or None."""
        found = self.store.result(self.identity(cell), set_name, self._converted(cell))
        if found is None or found.record["benchmark"] != self._benchmark(cell.scale, set_name):
            return None
        return found if agree(found.record["settings"], plain_settings(cell)) else None

    def _measure(self, cell: Cell, model: Upscale, set_name: str) -> None:
        start = time.perf_counter()
        table = self._evaluate(cell, model, set_name)
        making = None if cell.is_reference else self.store.making(self.identity(cell))
        record = {
            **self._head(cell),
            "set": set_name,
            "measured": "integer model" if self._converted(cell) else "simulation in float",
            "scores": table.to_dict(),
            "seconds": {
                "quantize": 0.0 if making is None else making["seconds"],
                "evaluate": round(time.perf_counter() - start, 3),
            },
            "benchmark": self._benchmark(cell.scale, set_name),
            "tile": self.settings.tile,
        }
        self.store.keep_result(self.identity(cell), set_name, record, self._converted(cell))

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
        path = self.store.picture(self.identity(cell), set_name, image, self._converted(cell))
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
        loaded, device = self.loaded(cell.scale), self.settings.device
        upscaler = of_loaded(loaded, cell.name)
        if cell.method != FLOAT:
            prepared = self.prepared(cell)
            upscaler = replace(upscaler, model=prepared)
            if self._converted(cell):
                upscaler = of_quantized(h.convert_harmoq(prepared), cell.name)
        return lambda image: upscaler(image.to(device), tile=self.settings.tile)

    def models(self, cells: Mapping[str, Cell]) -> tuple[dict[str, h.PreparedModel], dict[Cell, str]]:
        """Quantized models by the names of their cells, and the reasons of those that failed."""
        found: dict[Cell, h.PreparedModel] = {}

        def make(cell: Cell, counter: str) -> None:
            if not self.is_made(cell):
                self._say(f"[bold]{counter}[/] {escape(cell.name)}")
            found[cell] = self.prepared(cell)

        failures = self.attempt(cells.values(), make)
        return {name: found[cell] for name, cell in cells.items() if cell in found}, failures

    def is_made(self, cell: Cell) -> bool:
        """Whether the output folder holds the cell's model, made with the present settings."""
        making = self.store.making(self.identity(cell))
        return making is not None and agree(making["settings"], plain_settings(cell))

    def prepared(self, cell: Cell) -> h.PreparedModel:
        """The cell's quantized model: from the output folder, or made now and kept there."""
        stored = self.store.state(self.identity(cell)) if self.is_made(cell) else None
        if stored is not None:
            prepared = self.fresh(cell.scale, h.HarmoqConfig.from_dict(stored[1]["config"]))
            restore_state(prepared, stored[0])
            return prepared
        start, identity = time.perf_counter(), self.identity(cell)
        checkpoint = self.store.checkpoint(identity, plain_settings(cell))
        made = quantize(cell, self.loaded(cell.scale), self.photographs, self.settings.device, checkpoint)
        record = {
            **self._head(cell),
            "config": made.prepared.config.to_dict(),
            "seconds": round(time.perf_counter() - start, 3),
            "trace": made.trace,
        }
        self.store.keep_state(identity, state_of(made.prepared), record)
        checkpoint.unlink(missing_ok=True)
        return made.prepared

    def fresh(self, scale: int, config: h.HarmoqConfig) -> h.PreparedModel:
        """A prepared model with the float weights, observing nothing; it remembers them as its float reference."""
        prepared = h.prepare_harmoq(self.loaded(scale), config)
        disable_observers(prepared)
        float_reference(prepared)
        return prepared

    def loaded(self, scale: int) -> LoadedModel:
        """The float model of a scale, on the device."""
        return self._model(scale)[0]

    def _model(self, scale: int) -> tuple[LoadedModel, str]:
        if scale not in self._models:
            loaded = self._load(scale)
            digest = hashlib.sha256()
            for name, tensor in sorted(loaded.model.state_dict().items()):
                digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            loaded.model.to(self.settings.device)
            self._models[scale] = loaded, digest.hexdigest()[:16]
        return self._models[scale]

    # --- what identifies a cell ---------------------------------------------------------------------------------------

    def identity(self, cell: Cell) -> str:
        """File name of a cell; other photographs, another seed or another float model give another one."""
        return cell.identity(self._surroundings(cell))

    def _surroundings(self, cell: Cell) -> dict[str, Any]:
        if cell.method == BICUBIC:
            return {}
        loaded, digest = self._model(cell.scale)
        model = {"architecture": loaded.architecture, "model": digest}
        if cell.method == FLOAT:
            return model
        return model | {"seed": self.settings.seed, "photographs": self._photographs_digest}

    def _head(self, cell: Cell) -> dict[str, Any]:
        return {
            "cell": cell.to_dict(),
            "settings": plain_settings(cell),
            **self._surroundings(cell),
            "environment": environment(self.settings.device),
        }

    def _benchmark(self, scale: int, set_name: str) -> str:
        key = (scale, set_name)
        if key not in self._benchmarks:
            files = [file for pair in self.pairs(scale, set_name) for file in (pair.hr, pair.lr)]
            self._benchmarks[key] = files_digest(self.settings.benchmark, files)
        return self._benchmarks[key]

    def _converted(self, cell: Cell) -> bool:
        return self.settings.converted and not cell.is_reference

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def agree(recorded: Any, current: Any) -> bool:
    """Whether two settings are equal in every entry that both have (a later version may bring new ones)."""
    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        return all(agree(recorded[key], current[key]) for key in recorded if key in current)
    return bool(recorded == current)
