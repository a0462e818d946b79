"""First and second moments of two paired operands, exact far from zero."""

from __future__ import annotations

import torch
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, InputError

_CHUNK_ROWS = 8192  # bounds the memory of the products


class PairedMoments:
    """Means and second moments of rows ``z`` and of the rows ``d`` that belong to them.

    Products are taken about the means in the operands' own type and summed in float64, so that a mean much larger than
    the spread costs no digits.

    Args:
        z: `[..., K]`.
        d: `[..., L]`, row for row.

    Attributes:
        mean_z: Mean of z, float64 `[K]`.
        mean_d: Mean of d, float64 `[L]`.

    Raises:
        InputError: The rows do not pair up.
        CalibrationError: There are no rows.
    """

    def __init__(self, z: Tensor, d: Tensor) -> None:
        z, d = z.detach().flatten(0, -2), d.detach().flatten(0, -2)
        if len(z) != len(d):
            raise InputError("Rows of two operands do not pair up", found=f"{len(z)} and {len(d)}")
        if len(z) == 0:
            raise CalibrationError("Moments were asked for of no rows", found=tuple(z.shape), expected="[..., K]")
        shift_z, shift_d = z.double().mean(0).to(z), d.double().mean(0).to(d)
        # What is left of the means after rounding the shifts to the operands' type, and products about the shifts.
        self._rest_z, self._rest_d, self._zz, self._dz = _averages(z, d, shift_z, shift_d)
        self.mean_z = self._rest_z + shift_z.double()
        self.mean_d = self._rest_d + shift_d.double()

    def zz(self, *, centred: bool = True) -> Tensor:
        """Covariance of z (``E[z z^T]`` if not centred), float64 `[K, K]`."""
        covariance = self._zz - torch.outer(self._rest_z, self._rest_z)
        return covariance if centred else covariance + torch.outer(self.mean_z, self.mean_z)

    def dz(self, *, centred: bool = True) -> Tensor:
        """Covariance of d with z (``E[d z^T]`` if not centred), float64 `[L, K]`."""
        covariance = self._dz - torch.outer(self._rest_d, self._rest_z)
        return covariance if centred else covariance + torch.outer(self.mean_d, self.mean_z)


def _averages(z: Tensor, d: Tensor, shift_z: Tensor, shift_d: Tensor) -> list[Tensor]:
    """Means over the rows of z and d about their shifts, and of the products ``z z^T`` and ``d z^T``, float64."""
    width_z, width_d = z.shape[1], d.shape[1]
    sums = [z.new_zeros(shape, dtype=torch.float64) for shape in ((width_z,), (width_d,), (width_z,) * 2)]
    sums.append(z.new_zeros((width_d, width_z), dtype=torch.float64))
    for rows_z, rows_d in zip(z.split(_CHUNK_ROWS), d.split(_CHUNK_ROWS), strict=True):
        rows_z, rows_d = rows_z - shift_z, rows_d - shift_d
        for total, part in zip(sums, (rows_z.sum(0), rows_d.sum(0), rows_z.T @ rows_z, rows_d.T @ rows_z), strict=True):
            total += part
    return [total / len(z) for total in sums]
