"""Bytes of a saved model by kind of tensor."""

from __future__ import annotations

from dataclasses import dataclass

from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.conversion.save import stored_bytes, stored_tensors
from harmoq_ao.sites.quantized import QuantizedSite, WeightedSite
from harmoq_ao.zoo import build_architecture

_KINDS = {
    "codes": "weight codes",
    "weight_scale": "scales of weights",
    "joint_scale": "joint scales",
    "joint_shift": "joint shifts",
    "bias": "biases of sites",
    "weight": "float weights of sites",
}
_RANGES = "quantization ranges of activations"
_REST = "float layers, norms and tables"
_HEADERS = "names, layout and configuration"


@dataclass(frozen=True)
class SizeRow:
    """Bytes of one kind of tensor.

    Args:
        kind: In words.
        stored: In the saved model.
        float32: Bytes of as many numbers in float32; None for tensors that a float model lacks.
    """

    kind: str
    stored: int
    float32: int | None


def size_rows(model: QuantizedModel, on_disk: int) -> list[SizeRow]:
    """Bytes by kind of tensor, largest first; they add up to `on_disk`, the bytes of the folder."""
    stored: dict[str, int] = {}
    numbers: dict[str, int] = {}
    tensors = stored_tensors(model)
    for name, size in stored_bytes(model).items():
        kind = _kind(model, name)
        stored[kind] = stored.get(kind, 0) + size
        owner = model.model.get_submodule(name.rpartition(".")[0])
        packed = isinstance(owner, WeightedSite) and kind == _KINDS["codes"]
        count = tensors[name].shape[0] * owner.columns if packed else tensors[name].numel()  # type: ignore[operator]
        numbers[kind] = numbers.get(kind, 0) + 4 * int(count)
    added = {_KINDS["weight_scale"], _KINDS["joint_scale"], _KINDS["joint_shift"], _RANGES}
    rows = [SizeRow(kind, size, None if kind in added else numbers[kind]) for kind, size in stored.items()]
    rows.append(SizeRow(_HEADERS, on_disk - sum(stored.values()), None))
    return sorted(rows, key=lambda row: -row.stored)


def float32_bytes(model: QuantizedModel) -> int | None:
    """Bytes of the float model's parameters in float32, from its architecture; None where that is not known."""
    if model.traits.architecture is None:
        return None
    return sum(4 * p.numel() for p in build_architecture(model.traits.architecture).parameters())


def _kind(model: QuantizedModel, name: str) -> str:
    owner, _, attribute = name.rpartition(".")
    if not isinstance(model.model.get_submodule(owner), QuantizedSite):
        return _REST
    return _RANGES if attribute.endswith("_bounds") else _KINDS.get(attribute, _REST)
