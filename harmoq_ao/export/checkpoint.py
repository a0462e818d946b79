"""A float checkpoint with the weights that the integer codes stand for, under the architecture's own names.

Any program that reads the architecture's checkpoints (spandrel, and programs built on it) loads it like the original.
It computes with quantized weights and float activations. Such a file cannot hold joint scales and shifts, so they are
undone in the weights::

    W~ ((x - shift) / scale) + b~  =  W x + b        with W = W~ / scale and b = b~ - W shift
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from spandrel import MAIN_REGISTRY, ModelLoader
from torch import Tensor, nn

from harmoq_ao.common.errors import ExportError
from harmoq_ao.common.output import atomic_write
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.export.validation import check_exportable, failed
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.sites.quantized import WeightedSite
from harmoq_ao.zoo import build_architecture

logger = logging.getLogger(__name__)

OTHER_FORMATS = "export it as onnx or program"


@dataclass
class CheckpointState:
    """A float state dict, and what it cannot express.

    Attributes:
        tensors: Tensors by the architecture's names, float32 where they are floats.
        without_bias: Names of sites whose joint shift left a constant that the architecture has no bias for.
    """

    tensors: dict[str, Tensor]
    without_bias: list[str] = field(default_factory=list)


def export_checkpoint(quantized: QuantizedModel, path: str | Path) -> CheckpointState:
    """Write the float checkpoint of a quantized model as safetensors.

    Args:
        quantized: From :func:`convert_harmoq` or a saved model; left as it is.
        path: The file, replaced if it is there.

    Returns:
        What was written.

    Raises:
        ExportError: See `checkpoint_state`; or spandrel does not recognise the result.
        OutputError: The file cannot be written.
    """
    state = checkpoint_state(quantized)
    _check_loads(state.tensors)
    data = to_safetensors({name: tensor.contiguous() for name, tensor in state.tensors.items()}, {"format": "pt"})
    with atomic_write(path) as file:
        file.write(data)
    return state


def checkpoint_state(quantized: QuantizedModel) -> CheckpointState:
    """The float state dict of a quantized model, with exactly the keys of its architecture.

    Raises:
        ExportError: spandrel does not build the architecture, or a quantized weight is only a part of a parameter.
    """
    check_exportable(quantized)
    if quantized.traits.architecture is None:
        raise ExportError(
            "A checkpoint needs an architecture that spandrel builds",
            found="a model of another architecture",
            remedy=OTHER_FORMATS,
        )
    skeleton = build_architecture(quantized.traits.architecture)
    examples = [torch.rand(shape) for shape in quantized.example_shapes]
    prepared = prepare_harmoq(skeleton, quantized.config, examples).model
    _copy_floats(prepared, quantized.model)
    without_bias = [
        name for name, site in quantized.sites().items() if isinstance(site, WeightedSite) and _undo(prepared, site)
    ]
    if without_bias:
        logger.warning(
            "%d sites have a joint shift and no bias in this architecture, such as %s: the constant that rounding "
            "their weights left is not in the checkpoint",
            len(without_bias),
            without_bias[0],
        )
    known = prepared.state_dict()
    return CheckpointState({name: known[name].detach().clone() for name in skeleton.state_dict()}, without_bias)


@torch.no_grad()
def _copy_floats(prepared: nn.Module, converted: nn.Module) -> None:
    """Copy what stayed float, refined or not. Weights of sites follow in `_undo`."""
    sites = {f"{name}." for name, module in converted.named_modules() if isinstance(module, WeightedSite)}
    known = converted.state_dict()
    for name, tensor in prepared.state_dict().items():
        found = known.get(name)
        of_site = f"{name.rpartition('.')[0]}." in sites
        if found is not None and not of_site and found.device.type != "meta":
            tensor.copy_(found)


@torch.no_grad()
def _undo(prepared: nn.Module, site: WeightedSite) -> bool:
    """Write a site's weight and bias into the float model; True where the architecture has no bias for a constant."""
    target = prepared.get_submodule(site.site.path)
    assert isinstance(target, (nn.Linear, nn.Conv2d))
    _check_whole(prepared, site)
    weight = site.float_weight().float()
    if site.joint_scale is not None:
        weight = weight / site.joint_scale
    target.weight.copy_(weight.reshape(target.weight.shape))
    bias = site.bias
    if site.joint_shift is not None:
        assert bias is not None
        bias = bias - weight @ site.joint_shift
    if target.bias is not None and bias is not None:
        target.bias.copy_(bias)
    return target.bias is None and bias is not None


def _check_whole(prepared: nn.Module, site: WeightedSite) -> None:
    target = prepared.get_submodule(site.site.path)
    if not site.site.is_functional:
        return
    own = {id(p) for name, p in prepared.named_parameters(remove_duplicate=False) if "harmoq_" not in name}
    if id(target.weight) not in own:
        raise ExportError(
            "A quantized weight is not a parameter of the architecture, only computed from one",
            found=site.site.name,
            expected="weights that are parameters",
            remedy=OTHER_FORMATS,
        )


def _check_loads(tensors: dict[str, Tensor]) -> None:
    """Raise ExportError unless spandrel recognises the state dict and takes every tensor of it."""
    try:
        loaded = ModelLoader(registry=MAIN_REGISTRY).load_from_state_dict(copy.copy(tensors))
    except Exception as error:  # detection and constructors of spandrel may raise anything
        what = "spandrel does not recognise the checkpoint of this architecture"
        raise failed(what, error, remedy=OTHER_FORMATS) from error
    found = loaded.model.state_dict()
    odd = [name for name in tensors if name in found and found[name].shape != tensors[name].shape]
    if odd:
        raise ExportError("spandrel builds another architecture from this checkpoint", found=odd[0])
