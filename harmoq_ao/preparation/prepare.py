"""``prepare_harmoq``: a float model becomes one whose contractions are sites, observed and fake-quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.calling import image_parameter
from harmoq_ao.common.errors import ConfigError, InputError, SavedModelError
from harmoq_ao.common.structure import image_of, image_path
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph import Discovery, IslandState, is_island, leave_fast_path, make_island
from harmoq_ao.preparation.baking import bake_weights, copied
from harmoq_ao.preparation.fingerprint import fingerprint
from harmoq_ao.preparation.first_runs import first_runs
from harmoq_ao.preparation.measure import measure, report_unreached
from harmoq_ao.preparation.site_factory import SiteFactory
from harmoq_ao.preparation.swap import swap_modules
from harmoq_ao.quant.quantizer import OFF_BITS
from harmoq_ao.sites.base import PreparedSite, quiet
from harmoq_ao.sites.model import ModelTraits, PreparedModel
from harmoq_ao.zoo import LoadedModel, architecture_spec, image_traits_of

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor


def prepare_harmoq(
    model: nn.Module | LoadedModel | ImageModelDescriptor[Any],
    config: HarmoqConfig | None = None,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    output: str | int | None = None,
    strict: bool = False,
) -> PreparedModel:
    """Put a site at every linear layer and every product of activations.

    The given model is copied, not changed. With fake-quantization off (as it comes) the result equals it bit for bit,
    at every image size, and returns what it returns. torch's own attention modules equal their Python, not the fused
    function that torch calls instead in evaluation without gradients (``torch.backends.mha``).

    Args:
        model: Float model in evaluation mode semantics (``eval()`` is called on the copy), a
            :class:`LoadedModel`, or a spandrel descriptor.
        config: What to quantize; the default is W8A8 in the ``deploy`` profile.
        example_inputs: One image batch `[B, C, H, W]`, or several of different sizes; random images by default. Two
            sizes tell which lengths depend on the image.
        output: Which tensor of the output is the image, where the model returns a tuple, a dictionary or an object: an
            index, a key or an attribute, or several joined by dots. By default the largest tensor that has the sides of
            the input times a whole number.
        strict: Raise where a module cannot be traced, instead of leaving it float.

    Raises:
        ConfigError: A rule matches no site, or nothing at all is quantized.
        TraceError: A module cannot be traced (``strict``), or the result would differ from the original.
        InputError: The examples are not images, the model does not take them, or which tensor of its output is the
            image cannot be told.
    """
    config = config or HarmoqConfig()
    own = _float_copy(model)
    made_of = fingerprint(own)  # before a run leaves something in it
    leave_fast_path(own)
    bake_weights(own)
    with torch.no_grad():
        first = first_runs(own, example_inputs)
        prepared = PreparedModel(own, config, _traits(model, own, *first.runs[0], output))
        prepared.fingerprint = made_of
        prepared.example_shapes = [tuple(example.shape) for example, _ in first.runs]
        _make_islands(prepared, first.found, strict)
        swap_modules(prepared, first.found, first.fixed)
        measure(prepared, first.runs, first.found)
        report_unreached(prepared, first.found)
    names = [(m.site.name, m.site.kind) for m in prepared.sites()]
    config.check_rules(names + [(f.name, f.kind) for f in prepared.floats])
    for module in prepared.sites():
        module.attach_quantizers(config, first.runs[0].example.device)
    _check_that_something_is_quantized(prepared)
    return prepared


def _check_that_something_is_quantized(prepared: PreparedModel) -> None:
    """Raise where there is no site at all, or none is quantized although the widths alone ask for it."""
    config, rows = prepared.config, prepared.report().rows
    asked = min(config.weight_bits, config.act_bits) < min(OFF_BITS) and not config.rules
    if any(row.quantized for row in rows) or (prepared.sites() and not asked):
        return
    reasons = Counter(f"{row.kind}: {row.reason}" for row in rows)
    raise ConfigError(
        "Nothing in this model is quantized",
        found="; ".join(f"{n} x {text}" for text, n in reasons.most_common(4)) or "no contraction in its forward",
        expected="at least one linear layer, attention product or convolution that is",
        remedy="set conv_bits for convolutions, matmul_bits for products; strict=True shows what cannot be traced",
    )


def _float_copy(model: Any) -> nn.Module:
    inner = getattr(model, "model", None)
    if not isinstance(model, nn.Module) and isinstance(inner, nn.Module):
        model = inner  # a spandrel descriptor
    if not isinstance(model, nn.Module):
        raise InputError("prepare_harmoq takes a torch model", found=type(model).__name__, expected="torch.nn.Module")
    if any(isinstance(m, PreparedSite) or is_island(m) for m in model.modules()):
        raise InputError("This model is prepared already", remedy="prepare the float model it was made from")
    return copied(model).eval()


def _traits(given: Any, model: nn.Module, example: Tensor, output: Any, named: str | int | None) -> ModelTraits:
    """Traits of a loaded model or a descriptor as they come; of a bare module, what its output and its class tell."""
    if named is None and isinstance(given, LoadedModel):
        named = given.output
    path = image_path(output, example, named)
    try:
        architecture = architecture_spec(model)
    except SavedModelError:
        architecture = None
    scale = getattr(given, "scale", None)
    scale = scale if isinstance(scale, int) else max(1, round(image_of(output, path).shape[-1] / example.shape[-1]))
    called = {"output": path, "keyword": image_parameter(type(model)).keyword}
    known = image_traits_of(given)
    return ModelTraits(scale=scale, architecture=architecture, **(known | called))


def _make_islands(prepared: PreparedModel, found: Discovery, strict: bool) -> None:
    factory = SiteFactory(prepared.config, prepared.floats)
    for qualname in found.islands:
        module = prepared.model.get_submodule(qualname)
        make_island(module, IslandState(qualname, factory, quiet=quiet, strict=strict))
