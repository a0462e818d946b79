"""The choice of a kernel: one answer, for the call that runs it and for the report that names it.

A contraction knows which families of kernels take it (`LinearContraction`, `MatmulContraction`, `UniformContraction`).
The device and the backend decide which family is asked first, and nothing else in the project decides it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.triton_kernels.launch import supported

Backend = Literal["auto", "reference", "triton"]
"""``auto`` takes the CPU kernels on CPUs and Triton on GPUs; ``reference`` plain integers anywhere; ``triton`` Triton
anywhere, which on CPUs needs its interpreter."""

Family = Literal["cpu", "triton", "reference"]
"""Kernels that belong together: oneDNN and float kernels on codes, Triton, and the plain integer reference."""

NO_TRITON = "no Triton kernel of its own"
"""Refusal of contractions that Triton kernels compute only as part of something larger."""


def check_backend(backend: str) -> Backend:
    """Raise ConfigError unless `backend` is one of :data:`Backend`."""
    for known in get_args(Backend):
        if backend == known:
            return known
    raise ConfigError("Unknown backend", found=backend, expected=get_args(Backend))


@dataclass(frozen=True)
class Kernel:
    """The code path that runs a contraction.

    Attributes:
        name: As reports show it.
        run: Takes the floating-point operands of the contraction, and returns its result.
        refusal: Why the family that was asked first does not take the contraction; None if it does.
    """

    name: str
    run: Callable[..., Tensor]
    refusal: str | None = None


class Contraction(Protocol):
    """Anything that kernels can be chosen for."""

    def kernel(self, family: Family) -> Kernel:
        """The kernel of a family, or else the one that stands in for it, with the refusal."""
        ...


@dataclass(frozen=True)
class UniformContraction:
    """A contraction with one code path for every device, such as a convolution.

    Attributes:
        name: Of the path.
        run: Computes it.
        refusal: Why there is no Triton kernel.
    """

    name: str
    run: Callable[..., Tensor]
    refusal: str = NO_TRITON

    def kernel(self, family: Family) -> Kernel:
        """See :class:`Contraction`."""
        return Kernel(self.name, self.run, self.refusal if family == "triton" else None)


def preferred_family(device: torch.device, backend: Backend) -> Family:
    """The family that is asked first for tensors on a device."""
    if backend == "reference":
        return "reference"
    if backend == "triton" or supported(device):
        return "triton"
    # Older GPUs and other accelerators have no kernels of ours; plain integer arithmetic runs on any of them.
    return "cpu" if device.type == "cpu" else "reference"


def select_kernel(contraction: Contraction, device: torch.device, backend: Backend) -> Kernel:
    """The kernel that runs a contraction.

    Args:
        contraction: What to compute.
        device: Where its tensors are, or would be: a report may ask about a GPU that is not there.
        backend: The kernels that the user asked for.
    """
    return contraction.kernel(preferred_family(device, backend))
