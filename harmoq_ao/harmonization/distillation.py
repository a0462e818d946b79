"""What refinement minimises and what it is judged by: errors of features, and fidelity to the float network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.common import distributed
from harmoq_ao.harmonization.stages import first_tensor
from harmoq_ao.sites.model import PreparedModel

_PEAK = 1.0  # images are in 0..1
_TINY = 1e-12


@contextmanager
def features_of(model: PreparedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Context manager that collects the outputs of submodules by name while the model runs; of several calls the last.

    Args:
        model: The model.
        names: Names of submodules of ``model.model``.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = first_tensor(output)

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.model.get_submodule(name).register_forward_hook(keep(name)))
        yield found


def feature_error(
    reached: dict[str, Tensor], wanted: dict[str, Tensor], variances: dict[str, Tensor] | None = None
) -> Tensor:
    """Mean over the features of ``||f~ - f||^2 / Var(f)``; the variances are those of `wanted` unless given."""
    errors = []
    for name, target in wanted.items():
        variance = target.float().var() if variances is None else variances[name]
        errors.append(F.mse_loss(reached[name].float(), target.float()) / variance.clamp_min(_TINY))
    return torch.stack(errors).mean()


def shared_variances(wanted: dict[str, Tensor], names: Sequence[str], like: Tensor) -> dict[str, Tensor]:
    """Variances of features over the images of all ranks; a rank without images has none in `wanted`."""
    own = torch.zeros((len(names), 3), dtype=torch.float64, device=like.device)  # count, mean, squared deviations
    for row, name in zip(own, names, strict=True):
        if name in wanted:
            values = wanted[name].float()
            row.copy_(torch.stack((row.new_tensor(values.numel()), values.double().mean(), _deviations(values))))
    count, mean, squares = torch.stack(distributed.all_gather(own)).unbind(-1)  # each [ranks, names]
    total = count.sum(0)
    centre = (count * mean).sum(0) / total
    variance = (squares + count * (mean - centre).square()).sum(0) / (total - 1)
    return dict(zip(names, variance.float().unbind(), strict=True))


def _deviations(values: Tensor) -> Tensor:
    return (values.double() - values.double().mean()).square().sum()


@torch.no_grad()
def held_out_psnr(prepared: PreparedModel, targets: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> float:
    """Mean PSNR in dB of the model's output against the float network's, both clamped to 0..1.

    Args:
        prepared: The quantized network.
        targets: Images `[C, H, W]`, and the float network's outputs `[1, C, sH, sW]`.
        like: A tensor of the model's device and type.
    """
    total = 0.0
    for image, target in targets:
        output = prepared.image(image[None].to(like)).float()
        error = float((output.clamp(0, 1) - target.float().clamp(0, 1)).double().square().mean())
        total += 10.0 * math.log10(_PEAK**2 / max(error, _TINY))
    return total / len(targets)
