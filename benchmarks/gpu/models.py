"""The models that are measured: float ones with random weights, and ours made from them, once per width of bits."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import harmoq_ao as h
from benchmarks.gpu.results import sources
from benchmarks.peers import dat_light, hat_s, swinir_light
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.recipes.architectures import ARCHITECTURES

_CROPS = 2  # weights are random: ranges are needed, good ones are not


def _tiny(scale: int) -> nn.Module:
    """A small SwinIR, for the stand-in."""
    return next(entry for entry in ARCHITECTURES if entry.name == "SwinIR/light").build()


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "swinir-light": swinir_light,
    "hat-s": hat_s,
    "dat-light": dat_light,
    "swinir-tiny": _tiny,
}


def float_model(name: str, scale: int) -> nn.Module:
    """The float model, with the same random weights in every process."""
    torch.manual_seed(0)
    return MODELS[name](scale).eval()


def quantized_model(name: str, scale: int, bits: int, work: Path) -> QuantizedModel:
    """Ours, prepared, calibrated and saved once for these sources, then loaded; on the CPU, floats in bfloat16.

    Args:
        name: Key of :data:`MODELS`.
        scale: Upscaling factor.
        bits: Of weights and activations.
        work: Folder for saved models.
    """
    folder = work / sources(ours=True) / f"{name}-x{scale}-w{bits}a{bits}"
    if not folder.exists():
        _save(float_model(name, scale), bits, folder)
    return h.load_quantized(folder, model=float_model(name, scale))


def _save(model: nn.Module, bits: int, folder: Path) -> None:
    """Whole or not at all: two processes may be at it."""
    prepared = h.prepare_harmoq(model, h.HarmoqConfig(bits, bits), [crop(0)])
    crops = [crop(seed) for seed in range(_CROPS)]
    quantized = h.convert_harmoq(h.calibrate(prepared, crops, show_progress=False), float_dtype=torch.bfloat16)
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    h.save_quantized(quantized, own)
    try:
        own.rename(folder)
    except OSError:  # the other one was first
        shutil.rmtree(own)


def crop(seed: int, size: tuple[int, int] = (64, 64)) -> Tensor:
    """`[1, 3, *size]`, uniform in 0..1, the same for the same seed."""
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))


FUSED: dict[str, dict[str, int]] = {
    "swinir-light": {"window attention": 24, "mlp": 24},
    "hat-s": {"mlp": 42},
    "swinir-tiny": {"window attention": 4, "mlp": 4},
}
"""Least numbers of islands that one kernel each has to compute."""


def fused(quantized: QuantizedModel) -> dict[str, int]:
    """Numbers of islands that one kernel each computes on a GPU, by the kind of kernel."""
    found = {
        (lowering.kernel, name.rpartition(".")[0])
        for name, lowering in quantized.lowerings("cuda").items()
        if lowering.reason is None
    }
    return dict(Counter(kernel.removeprefix("triton ").replace("_", " ") for kernel, _ in found))
