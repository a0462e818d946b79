"""Reading a saved model, which may come from anywhere: nothing in it is trusted, and no code in it is run.

The architecture is built by spandrel from its hyperparameters. Its sites are put where the config says that preparing
found them; where that was another version of the author's source, or an older format, it is prepared anew. Then it is
filled with the stored tensors, each of which is checked for its shape, type and values.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import ConfigError, SavedModelError, shown
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.check_saved_model import check_tensor, read_config, read_tensors
from harmoq_ao.conversion.convert import replace_sites
from harmoq_ao.conversion.format import CONFIG_NAME, REMEDY, storable_state, unflatten_floats
from harmoq_ao.conversion.found_format import Description, check_exchanged, description_of
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.preparation.baking import copied
from harmoq_ao.preparation.fingerprint import fingerprint
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.preparation.restore import restore
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import ModelTraits, PreparedModel
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.zoo.architectures import build_architecture

logger = logging.getLogger(__name__)


def load_quantized(path: str | Path, model: nn.Module | None = None, *, verify: bool = False) -> QuantizedModel:
    """Load a saved model. The network is not run, unless its source is not the one it was saved with.

    Args:
        path: Folder written by :func:`save_quantized`.
        model: A float model of the same architecture, with any weights; needed where the architecture is not one that
            spandrel builds.
        verify: Prepare the architecture anew, running it on random images, and compare what is found, and that the
            prepared model equals the float one bit for bit, with what the folder says. It takes seconds.

    Raises:
        SavedModelError: Missing, truncated or changed files, another format, or tensors that do not fit; with `verify`
            also where preparing finds something else.
    """
    folder = Path(path)
    config = read_config(folder)
    tensors = read_tensors(folder, config["weights"])
    try:
        with _no_collection():
            return assembled(config, tensors, model, verify)
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


@contextmanager
def _no_collection() -> Iterator[None]:
    """Context manager without garbage collection, whose passes over all of torch take longer than a load."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def assembled(
    config: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module | None = None, verify: bool = False
) -> QuantizedModel:
    """The model that a checked config and its tensors describe; arguments otherwise as in :func:`load_quantized`.

    Args:
        config: From :func:`read_config`.
        tensors: From :func:`read_tensors`; emptied.
        model: A float model of the architecture.
        verify: Compare with a preparation.
    """
    settings = HarmoqConfig.from_dict(config["quantization_config"])
    traits = ModelTraits.from_dict(config["traits"])
    description = Description.from_dict(config["found"]) if "found" in config else None
    given = model if model is None or isinstance(model, nn.Module) else _inner(model)
    prepared = None if description is None or verify else _restored(description, settings, traits, given)
    restored = prepared is not None
    if prepared is None:
        skeleton = _skeleton(traits) if given is None else given
        prepared = prepare_harmoq(skeleton, settings, _examples(config, skeleton))
    prepared.traits = traits
    prepared.example_shapes = [tuple(shape) for shape in config["example_shapes"]]
    _apply_measurements(prepared, config["sqnr_db"] if description is None else description.sqnr_db)
    quantized = _empty_model(prepared)
    quantized.history = History.from_dict(config["history"]) if "history" in config else None
    _fill(quantized, unflatten_floats(tensors, config["weights"]["layout"], storable_state(quantized.model)))
    if restored and description is not None:
        check_exchanged(quantized.model, description.exchanged)
        quantized.exchanged = description.exchanged
    if config["float_dtype"] == "bfloat16":
        quantized.set_float_dtype(torch.bfloat16)
    else:
        quantized.finalize()
    if verify and description is not None:
        _compare(description, description_of(quantized))
    return quantized


def _restored(
    description: Description, config: HarmoqConfig, traits: ModelTraits, given: nn.Module | None
) -> PreparedModel | None:
    """The prepared model without a run; None where the source or the model is not what the description was made of."""
    found = description.found
    if found.fingerprint is None or found.torch not in (None, str(torch.__version__)):
        return None
    skeleton = _skeleton(traits, random=False) if given is None else given
    if fingerprint(skeleton) != found.fingerprint:
        logger.info("the model's source is not that of the saved model, which is therefore prepared anew")
        return None
    skeleton = skeleton if given is None else copied(given).eval()
    return restore(skeleton, config, found, traits)


def _skeleton(traits: ModelTraits, random: bool = True) -> nn.Module:
    """The architecture, with random weights or zeros."""
    spec = traits.architecture
    if spec is None:
        raise SavedModelError(
            "This model is of an architecture that spandrel does not build",
            remedy="pass a float model of the same architecture: load_quantized(path, model=...)",
        )
    return build_architecture(spec, random=random)


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


def _compare(said: Description, seen: Description) -> None:
    """Whether a preparation finds what the folder says."""
    for name, value in said.to_dict().items():
        now = seen.to_dict()[name]
        if value != now and name not in ("fingerprint", "torch"):
            raise SavedModelError(
                f"Preparing the model finds other {name} than were saved with it",
                found=shown(now),
                expected=shown(value),
                remedy="use the versions of spandrel and harmoq-ao that saved it, or quantize the float model anew",
            )


def _apply_measurements(prepared: PreparedModel, measured: dict[str, float | None]) -> None:
    names = {m.site.name for m in prepared.sites() if m.site.reason is None}
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
    replace_sites(
        prepared.model,
        lambda site: site.empty_quantized(prepared.settings(site.site)),
        lambda site: site.site.reason is None,
    )
    quantized = QuantizedModel(prepared.model, prepared.config, rows, prepared.example_shapes, prepared.traits)
    quantized.fingerprint = prepared.fingerprint
    return quantized.eval()


def _fill(quantized: QuantizedModel, tensors: dict[str, Tensor]) -> None:
    """Copy stored tensors into the model, checking names, shapes, types and values."""
    expected = storable_state(quantized.model)
    sites = {f"{name}." for name, m in quantized.model.named_modules() if isinstance(m, QuantizedSite)}
    of_site = {name for name in expected if name[: name.rfind(".") + 1] in sites}
    unknown = sorted(set(tensors) - set(expected))
    needed = {n for n, t in expected.items() if isinstance(t, nn.Parameter) or n in of_site}
    missing = sorted(needed - set(tensors))
    if unknown or missing:
        found = f"unknown {unknown[0]}" if unknown else f"missing {missing[0]}"
        raise SavedModelError("The stored tensors do not fit the architecture", found=found, remedy=REMEDY)
    with torch.no_grad():
        for name, tensor in tensors.items():
            target = expected[name]
            check_tensor(name, tensor, target, name in of_site)
            target.copy_(tensor)
