"""A quantized linear for any device: its integer operands, and what each family of kernels makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.kernels import onednn
from harmoq_ao.kernels.select import Family, Kernel
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import LinearOperands

if TYPE_CHECKING:
    from harmoq_ao.triton_kernels.operands import PackedLinear as TritonLinear


class LinearContraction:
    """A quantized ``F.linear``, `[..., K]` to `[..., N]` in the type of its input.

    Packings are made when a kernel first needs them: a model on a CPU never pays for Triton's, nor imports it.

    Args:
        operands: Codes, scales and quantization range of the activations.
        packed_codes: The weight codes as they are stored, `[N, packed K]`.
        weight_bits: Their width.
    """

    def __init__(self, operands: LinearOperands, packed_codes: Tensor, weight_bits: int) -> None:
        self.operands = operands
        self._codes = packed_codes
        self._weight_bits = weight_bits
        self._onednn: onednn.PackedLinear | None = None
        self._triton: TritonLinear | None = None
        self._refusal: str | None = None  # kept too: finding it reads all codes

    def kernel(self, family: Family) -> Kernel:
        """The kernel of a family; the integer reference stands in where Triton refuses the operands.

        What it runs raises KernelError for another number of channels and, but for Triton, InputError for a NaN.
        """
        if family == "cpu":
            exact = onednn.is_exact(self.operands.weight.shape[1])
            name = "onednn u8s8" if exact else "float32 on integer codes"
            return Kernel(name, lambda x: onednn.linear(x, self.packed_onednn()))
        refusal = None
        if family == "triton":
            try:
                packed = self.packed_triton()
                return Kernel("triton lowbit_linear", lambda x: self._run_triton(x, packed))
            except KernelError as error:
                refusal = str(error)
        return Kernel("reference integer", lambda x: integer_reference.linear(x, self.operands), refusal)

    def packed_triton(self) -> TritonLinear:
        """The operands of the Triton kernels.

        Raises:
            KernelError: The kernels do not take this linear.
        """
        if self._triton is None and self._refusal is None:
            from harmoq_ao.triton_kernels.operands import from_operands  # imports triton

            try:
                self._triton = from_operands(self.operands, self._codes, self._weight_bits)
            except KernelError as error:
                self._refusal = str(error)
        if self._triton is None:
            raise KernelError(self._refusal or "The Triton kernels do not take this linear")
        return self._triton

    def _run_triton(self, x: Tensor, packed: TritonLinear) -> Tensor:
        from harmoq_ao.triton_kernels import lowbit_linear

        integer_reference.check_input(x, self.operands)
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        y = lowbit_linear.launch_lowbit_linear(rows, packed, out_dtype=x.dtype)
        return y.reshape(*x.shape[:-1], packed.rows)

    def ready_onednn(self) -> onednn.PackedLinear | None:
        """:meth:`packed_onednn` if a call has made it ready, else None."""
        return self._onednn

    def packed_onednn(self) -> onednn.PackedLinear:
        """The operands of the CPU's kernels, made ready on first use."""
        if self._onednn is None:
            self._onednn = onednn.pack_linear(self.operands)
        return self._onednn
