"""Running first and second moments of two paired operands, on memory that does not grow with the data."""

from __future__ import annotations

import torch
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError, InputError

MOMENTUM = 0.9
"""Share of the running average that a new sample leaves, once the warm-up is over."""

WARM_UP = 200
"""Samples that are averaged plainly before the running average begins."""

_CHUNK_ROWS = 8192


class PairedMoments:
    """Means and second moments of rows ``z`` and of the rows ``d`` that belong to them.

    One call of :meth:`update` is one sample (a batch of images, say). During the warm-up every row counts the same, so
    the result is the plain average over all rows so far; afterwards
    ``average = momentum * average + (1 - momentum) * sample``. Products are taken about the mean of the first sample
    and added up in float64, so that a mean much larger than the spread costs no digits.

    Args:
        momentum: In [0, 1).
        warm_up: Samples averaged plainly, at least 1.

    Attributes:
        samples: Calls of :meth:`update` so far.

    Raises:
        ConfigError: A value is outside its range.
    """

    def __init__(self, momentum: float = MOMENTUM, warm_up: int = WARM_UP) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ConfigError("The momentum of running moments is out of range", found=momentum, expected="in [0, 1)")
        if type(warm_up) is not int or warm_up < 1:
            raise ConfigError("The warm-up of running moments is out of range", found=warm_up, expected="1 or more")
        self.momentum = momentum
        self.warm_up = warm_up
        self.samples = 0
        self._rows = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._average: list[Tensor] = []  # of z, d, z z^T and d z^T about the shift

    def update(self, z: Tensor, d: Tensor) -> None:
        """Add one sample.

        Args:
            z: `[..., K]`.
            d: `[..., L]`, row for row.

        Raises:
            InputError: The rows do not pair up, or the widths differ from before.
        """
        z, d = z.detach().flatten(0, -2), d.detach().flatten(0, -2)
        if len(z) != len(d):
            raise InputError("Rows of two operands do not pair up", found=f"{len(z)} and {len(d)}")
        if self._shift is not None and (self._shift[0].shape != z.shape[1:] or self._shift[1].shape != d.shape[1:]):
            widths = tuple(len(s) for s in self._shift)
            raise InputError("Rows of another width", found=(z.shape[1], d.shape[1]), expected=widths)
        if len(z) == 0:
            return
        if self._shift is None:
            self._shift = z.double().mean(0).to(z), d.double().mean(0).to(d)
        sample = _averages(z, d, self._shift)
        self.samples += 1
        self._rows += len(z)
        share = len(z) / self._rows if self.samples <= self.warm_up else 1.0 - self.momentum
        if not self._average:
            self._average = sample
            return
        for average, new in zip(self._average, sample, strict=True):
            average.lerp_(new, share)

    @property
    def mean_z(self) -> Tensor:
        """Mean of z, float64 `[K]`."""
        return self._shifted(0)

    @property
    def mean_d(self) -> Tensor:
        """Mean of d, float64 `[L]`."""
        return self._shifted(1)

    def zz(self, *, centred: bool = True) -> Tensor:
        """Covariance of z (``E[z z^T]`` if not centred), float64 `[K, K]`.

        Raises:
            CalibrationError: Nothing was added.
        """
        mean = self.mean_z
        covariance = self._average[2] - torch.outer(self._average[0], self._average[0])
        return covariance if centred else covariance + torch.outer(mean, mean)

    def dz(self, *, centred: bool = True) -> Tensor:
        """Covariance of d with z (``E[d z^T]`` if not centred), float64 `[L, K]`.

        Raises:
            CalibrationError: Nothing was added.
        """
        mean_d, mean_z = self.mean_d, self.mean_z
        covariance = self._average[3] - torch.outer(self._average[1], self._average[0])
        return covariance if centred else covariance + torch.outer(mean_d, mean_z)

    def _shifted(self, index: int) -> Tensor:
        if self._shift is None:
            raise CalibrationError("Moments were asked for before any data", remedy="call update first")
        return self._average[index] + self._shift[index].double()


def _averages(z: Tensor, d: Tensor, shift: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Means over the rows of ``z - c``, ``d - e`` and of their products, float64."""
    width_z, width_d = z.shape[1], d.shape[1]
    sums = [z.new_zeros(shape, dtype=torch.float64) for shape in ((width_z,), (width_d,), (width_z,) * 2)]
    sums.append(z.new_zeros((width_d, width_z), dtype=torch.float64))
    for rows_z, rows_d in zip(z.split(_CHUNK_ROWS), d.split(_CHUNK_ROWS), strict=True):
        rows_z, rows_d = rows_z - shift[0], rows_d - shift[1]
        for total, part in zip(sums, (rows_z.sum(0), rows_d.sum(0), rows_z.T @ rows_z, rows_d.T @ rows_z), strict=True):
            total += part
    return [total / len(z) for total in sums]
