"""Reading a saved model, which may come from anywhere: nothing in it is trusted, and no code in it is run.

The architecture is built by spandrel from its hyperparameters, prepared as it was before it was quantized, and filled
with the stored tensors, each of which is checked for its shape, type and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import ConfigError, SavedModelError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.check_saved_model import check_tensor, read_config, read_tensors
from harmoq_ao.conversion.convert import replace_sites
from harmoq_ao.conversion.format import CONFIG_NAME, REMEDY, storable_state, unflatten_floats
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import ModelTraits, PreparedModel
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.zoo.architectures import build_architecture


def load_quantized(path: str | Path, model: nn.Module | None = None) -> QuantizedModel:
    """Load a saved model.

    Args:
        path: Folder written by :func:`save_quantized`.
        model: A float model of the same architecture, with any weights; needed where the architecture is not one that
            spandrel builds.

    Raises:
        SavedModelError: Missing, truncated or changed files, another format, or tensors that do not fit.
    """
    folder = Path(path)
    config = read_config(folder)
    tensors = read_tensors(folder, config["weights"])
    try:
        return _assembled(config, tensors, model)
    except SavedModelError:
        raise
    except ConfigError as error:
        raise SavedModelError(f"{folder / CONFIG_NAME} holds a configuration that is not valid: {error}") from error
    except Exception as error:  # an author's model on hyperparameters, shapes and tensors that only look right
        raise SavedModelError(
            f"The model in {folder} does not fit its architecture",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy=REMEDY if model is None else "pass a float model of the architecture that was saved",
        ) from error


def _assembled(config: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module | None) -> QuantizedModel:
    """The model that a checked config and its tensors describe."""
    settings = HarmoqConfig.from_dict(config["quantization_config"])
    traits = ModelTraits.from_dict(config["traits"])
    skeleton = _skeleton(traits) if model is None else model if isinstance(model, nn.Module) else _inner(model)
    prepared = prepare_harmoq(skeleton, settings, _examples(config, skeleton))
    prepared.traits = traits
    _apply_measurements(prepared, config["sqnr_db"])
    quantized = _empty_model(prepared)
    quantized.history = History.from_dict(config["history"]) if "history" in config else None
    _fill(quantized, unflatten_floats(tensors, config["weights"]["layout"], storable_state(quantized.model)))
    if config["float_dtype"] == "bfloat16":
        return quantized.set_float_dtype(torch.bfloat16)
    quantized.finalize()
    return quantized


def _skeleton(traits: ModelTraits) -> nn.Module:
    """The architecture with random weights."""
    spec = traits.architecture
    if spec is None:
        raise SavedModelError(
            "This model is of an architecture that spandrel does not build",
            remedy="pass a float model of the same architecture: load_quantized(path, model=...)",
        )
    return build_architecture(spec)


def _inner(model: Any) -> nn.Module:
    """The module of a loaded checkpoint."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise SavedModelError("model must be a float model", found=type(model).__name__, expected="torch.nn.Module")
    return inner


def _examples(config: dict[str, Any], skeleton: nn.Module) -> list[Tensor]:
    """Random images of the sizes that the saved model was prepared on: islands are found by running the model."""
    generator = torch.Generator().manual_seed(0)
    like = next(skeleton.parameters(), torch.empty(0))
    return [torch.rand(shape, generator=generator).to(like) for shape in config["example_shapes"]]


def _apply_measurements(prepared: PreparedModel, measured: dict[str, float | None]) -> None:
    names = {m.site.name for m in prepared.sites() if m.quantizers()}
    if names != set(measured):
        odd = sorted(names ^ set(measured))
        raise SavedModelError(
            "The saved sites are not those of the architecture",
            found=f"{len(odd)} differ, such as {odd[0]}",
            remedy="use the versions of spandrel and harmoq-ao that saved it",
        )
    for module in prepared.sites():
        module.site.sqnr_db = measured.get(module.site.name)


def _empty_model(prepared: PreparedModel) -> QuantizedModel:
    """The quantized model with its stored tensors yet to be filled in."""
    rows = prepared.report().rows
    replace_sites(prepared.model, lambda site: site.empty_quantized(prepared.settings(site.site)))
    quantized = QuantizedModel(prepared.model, prepared.config, rows, prepared.example_shapes, prepared.traits)
    return quantized.eval()


def _fill(quantized: QuantizedModel, tensors: dict[str, Tensor]) -> None:
    """Copy stored tensors into the model, checking names, shapes, types and values."""
    expected = storable_state(quantized.model)
    unknown = sorted(set(tensors) - set(expected))
    needed = {n for n, t in expected.items() if isinstance(t, nn.Parameter) or _of_site(quantized, n)}
    missing = sorted(needed - set(tensors))
    if unknown or missing:
        found = f"unknown {unknown[0]}" if unknown else f"missing {missing[0]}"
        raise SavedModelError("The stored tensors do not fit the architecture", found=found, remedy=REMEDY)
    for name, tensor in tensors.items():
        target = expected[name]
        check_tensor(name, tensor, target, _of_site(quantized, name))
        with torch.no_grad():
            target.copy_(tensor)


def _of_site(quantized: QuantizedModel, name: str) -> bool:
    return isinstance(quantized.model.get_submodule(name.rpartition(".")[0]), QuantizedSite)
