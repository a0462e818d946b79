"""One quantized linear on whichever device its input lies: which kernel runs it, made ready on first use."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError, KernelError
from harmoq_ao.kernels import onednn
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import LinearOperands

Backend = Literal["auto", "reference", "triton"]
"""``auto`` takes oneDNN on CPUs and Triton on GPUs; ``reference`` plain integers anywhere; ``triton`` Triton anywhere,
which on CPUs needs its interpreter."""


def check_backend(backend: str) -> Backend:
    """Raise ConfigError unless `backend` is one of :data:`Backend`."""
    for known in get_args(Backend):
        if backend == known:
            return known
    raise ConfigError("Unknown backend", found=backend, expected=get_args(Backend))


class LinearKernel:
    """A quantized linear, ready to run.

    Args:
        operands: Codes, scales and bounds.
        packed_codes: The weight codes as they are stored, `[N, packed K]`.
        weight_bits: Their width.
    """

    def __init__(self, operands: LinearOperands, packed_codes: Tensor, weight_bits: int) -> None:
        self.operands = operands
        self._codes = packed_codes
        self._weight_bits = weight_bits
        self._ready: dict[str, Any] = {}

    def __call__(self, x: Tensor, backend: Backend = "auto") -> Tensor:
        """Quantized ``F.linear`` of `[..., K]` to `[..., N]`, in the dtype of ``x``.

        Raises:
            KernelError: ``x`` has another number of channels.
            InputError: ``x`` holds a NaN (where the kernel can tell: not on GPUs).
        """
        chosen = self.choose(backend, x.device)
        if chosen == "triton":
            return self._triton(x)
        if chosen == "onednn":
            return onednn.linear(x, self.packed_onednn())
        return integer_reference.linear(x, self.operands)

    def choose(self, backend: Backend, device: torch.device) -> str:
        """``onednn``, ``triton`` or ``reference``."""
        if backend == "reference":
            return "reference"
        if backend == "triton" or device.type == "cuda":
            return "triton" if self.triton_refusal() is None else "reference"
        return "onednn" if device.type == "cpu" else "reference"

    def name(self, backend: Backend, device: torch.device) -> str:
        """Name of the kernel, for reports."""
        chosen = self.choose(backend, device)
        if chosen == "onednn":
            return "onednn u8s8" if onednn.is_available() else "float32 on integer codes"
        return "reference integer" if chosen == "reference" else "triton lowbit_linear"

    def triton_refusal(self) -> str | None:
        """Why the Triton kernel does not take this linear; None if it does."""
        if "triton" not in self._ready and "refusal" not in self._ready:
            from harmoq_ao.triton_kernels.operands import from_operands  # imports triton

            try:
                self._ready["triton"] = from_operands(self.operands, self._codes, self._weight_bits)
            except KernelError as error:
                self._ready["refusal"] = str(error)
        refusal: str | None = self._ready.get("refusal")
        return refusal

    def packed_triton(self) -> Any:
        """The operands of the Triton kernels, `harmoq_ao.triton_kernels.operands.PackedLinear`.

        Raises:
            KernelError: The kernel does not take this linear.
        """
        refusal = self.triton_refusal()
        if refusal is not None:
            raise KernelError("The Triton kernel does not take this linear", found=refusal)
        return self._ready["triton"]

    def _triton(self, x: Tensor) -> Tensor:
        from harmoq_ao.triton_kernels import lowbit_linear

        integer_reference.check_input(x, self.operands)
        packed = self.packed_triton()
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        y = lowbit_linear.launch_lowbit_linear(rows, packed, out_dtype=x.dtype)
        return y.reshape(*x.shape[:-1], packed.rows)

    def ready_onednn(self) -> onednn.PackedLinear | None:
        """:meth:`packed_onednn` if a call has made it ready, else None."""
        return self._ready.get("onednn")

    def packed_onednn(self) -> onednn.PackedLinear:
        """The operands of the CPU's kernels, made ready on first use."""
        if "onednn" not in self._ready:
            self._ready["onednn"] = onednn.pack_linear(self.operands)
        packed: onednn.PackedLinear = self._ready["onednn"]
        return packed
