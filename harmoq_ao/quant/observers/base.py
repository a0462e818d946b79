"""The base of all observers: ranges, a random sample, and their merging over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.common.distributed import all_max, all_min, is_first
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.common.torchao_import import pt2e
from harmoq_ao.quant.quantizer import QuantizerSpec, step_size
from harmoq_ao.quant.reservoir import Reservoir

ROW_BUDGET = 4
"""The row reservoir may hold this many times `reservoir_values` numbers, however many channels there are."""


@dataclass(frozen=True)
class Call:
    """Size and place of an operand, without its values.

    Args:
        values: Number of values.
        channels: Length of the contracted axis.
        device: Its device.
    """

    values: int
    channels: int
    device: torch.device


class OperandObserver(pt2e.ObserverBase):
    """Collects the statistics of one operand; subclasses derive a quantization range from them.

    Memory does not grow with the number of batches: two vectors of K, and a sample of at most
    ``max(4 * reservoir_values, K)`` numbers (2 MiB in float32 by default), allocated with the first batch on the
    operand's device; see :attr:`nbytes`. None of it is part of the state dict. The global random state is untouched;
    equal seeds and equal batches give equal samples.

    A per-channel observer whose number of channels changes between calls (the contracted axis counts pixels, say) drops
    its channel statistics and goes on with a sample of single values, drawn from the rows collected so far.

    Args:
        spec: The quantizer the bounds are for.
        contracted_axis: The axis of the operand that its contraction sums over, K long.
        track_channels: Keep per-channel ranges and whole rows; otherwise single values.
        reservoir_rows: Largest number of rows in the sample.
        reservoir_values: Largest number of single values in the sample.
        seed: Of the random sample.

    Attributes:
        site_name: Used in error messages.
        rows_seen: Rows (tokens) observed so far, by all ranks.
        calls: If a list, calls are recorded there instead of observed.
    """

    def __init__(
        self,
        spec: QuantizerSpec,
        *,
        contracted_axis: int = -1,
        track_channels: bool = True,
        reservoir_rows: int = 2048,
        reservoir_values: int = 131072,
        seed: int = 0,
    ) -> None:
        super().__init__(dtype=torch.uint8, is_dynamic=spec.dynamic)
        if reservoir_rows < 1 or reservoir_values < 1:
            raise ConfigError("An observer needs room for a sample", found=(reservoir_rows, reservoir_values))
        self.spec = spec
        self.contracted_axis = contracted_axis
        self.reservoir_rows = reservoir_rows
        self.reservoir_values = reservoir_values
        self.seed = seed
        self.site_name = ""
        self._track_channels = track_channels
        self.reset()

    def reset(self) -> None:
        """Discard all statistics."""
        self.rows_seen = 0
        self.tracks_channels = self._track_channels
        self._range: tuple[Tensor, Tensor] | None = None
        self._channel_range: tuple[Tensor, Tensor] | None = None
        self._reservoir: Reservoir | None = None
        self._last_call: Call | None = None
        self.calls: list[Call] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Add `x` to the statistics and return it.

        Raises:
            CalibrationError: `x` holds NaN or infinity.
        """
        if x.numel() == 0:
            return x
        values = x.detach()
        rows = values.movedim(self.contracted_axis, -1) if values.dim() else values.reshape(1, 1)
        call = Call(rows.numel(), rows.shape[-1], rows.device)
        if self.calls is not None:
            self.calls.append(call)
            return x
        self._check_channels(call)
        self._update_range(rows)
        self._update_sample(rows)
        self._count_rows(call)
        return x

    # --- several processes -------------------------------------------------------------------------------------------

    def begin_share(self) -> None:
        """Start to observe this rank's share alone; what every rank saw before counts once, as the first rank's."""
        if self._reservoir is not None:
            self._reservoir.own(is_first())

    def pass_over(self, call: Call) -> None:
        """Account for a call that another rank observes."""
        self._check_channels(call)
        self._pass_over_sample(call)
        self._count_rows(call)

    def merge(self) -> None:
        """Merge the statistics of all ranks: each ends with those of a single process that saw everything.

        Raises:
            RankLostError: A rank did not take part.
        """
        if self._last_call is None:
            return  # nothing was seen on any rank
        self._range = _over_ranks(self._range, (), self._last_call.device)
        if self.tracks_channels:
            shape = (self._last_call.channels,)
            self._channel_range = _over_ranks(self._channel_range, shape, self._last_call.device)
        self._merge_sample()

    def _merge_sample(self) -> None:
        if self._reservoir is not None:
            self._reservoir.merge()

    # --- statistics ---------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes held by the statistics."""
        tensors = [*(self._range or ()), *(self._channel_range or ())]
        sample = self._reservoir.nbytes if self._reservoir is not None else 0
        return sum(t.numel() * t.element_size() for t in tensors) + sample

    def value_range(self) -> tuple[Tensor, Tensor]:
        """Exact minimum and maximum of everything seen, 0-dimensional.

        Raises:
            CalibrationError: Nothing was seen.
        """
        if self._range is None:
            raise self._nothing_seen()
        return self._range

    def channel_range(self) -> tuple[Tensor, Tensor] | None:
        """Exact ``(minimum [K], maximum [K])``, or None without channels."""
        return self._channel_range

    def sample(self) -> Tensor:
        """The sample so far: rows `[R, K]`, or values `[R]` without channels, float32.

        Raises:
            CalibrationError: Nothing was seen.
        """
        if self._reservoir is None:
            raise self._nothing_seen()
        return self._reservoir.items()

    def second_moment(self, shift: Tensor | None = None) -> Tensor | None:
        """Mean square of ``x - shift`` per channel `[K]` over the sample, or None without channels."""
        if not self.tracks_channels:
            return None
        return (self.sample() if shift is None else self.sample() - shift).square().mean(0)

    def bounds(self, scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Per-tensor bounds ``(lo, hi)`` of ``(x - shift) / scale``, 0-dimensional, snapped to the spec's scheme.

        Args:
            scale: Joint scale `[K]`, positive; None for all ones.
            shift: Joint shift `[K]`; None for all zeros.

        Raises:
            CalibrationError: Nothing was seen, or a per-channel scale meets statistics without channels.
        """
        raise NotImplementedError("subclasses decide the bounds")

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Step and lower bound for the unscaled operand, ``(step, lo)``."""
        lo, hi = self.bounds()
        return step_size(lo, hi, self.spec.bits), lo

    def scaled_range(self, scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Exact minimum and maximum of ``(x - shift) / scale`` over everything seen, 0-dimensional."""
        lo, hi = self.value_range()
        if scale is None and shift is None:
            return lo, hi
        scale = self._as_vector(torch.ones(()) if scale is None else scale, lo)
        shift = self._as_vector(torch.zeros(()) if shift is None else shift, lo)
        if max(scale.numel(), shift.numel()) > 1 and self._channel_range is not None:
            lo, hi = self._channel_range
        return ((lo - shift) / scale).amin(), ((hi - shift) / scale).amax()

    def scaled_sample(self, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """The sample of ``(x - shift) / scale``."""
        sample = self.sample()
        sample = sample if shift is None else sample - self._as_vector(shift, sample)
        return sample if scale is None else sample / self._as_vector(scale, sample)

    def _as_vector(self, scale: Tensor, like: Tensor) -> Tensor:
        flat = scale.detach().to(like).reshape(-1)
        channels = self._channel_range[0].numel() if self._channel_range is not None else None
        if flat.numel() not in (1, channels):
            raise CalibrationError(
                f"{self._name()} cannot apply a joint scale of {flat.numel()} channels",
                found="no per-channel statistics" if channels is None else f"statistics of {channels} channels",
                expected="one scale for each channel observed, or a single one",
                remedy="observe with track_channels=True, on a contracted axis of constant length",
            )
        return flat

    def _check_channels(self, call: Call) -> None:
        if self.tracks_channels and self._last_call is not None and self._last_call.channels != call.channels:
            self._forget_channels()

    def _count_rows(self, call: Call) -> None:
        self._last_call = call
        self.rows_seen += call.values // call.channels

    def _forget_channels(self) -> None:
        self.tracks_channels = False
        self._channel_range = None
        if self._reservoir is not None:
            self._reservoir = self._reservoir.flattened(self.reservoir_values)

    def _update_range(self, rows: Tensor) -> None:
        if self.tracks_channels:
            lo, hi = _channel_extremes(rows)
            self._check_finite(lo, hi)
            self._channel_range = _merged(self._channel_range, lo, hi)
            lo, hi = lo.amin(), hi.amax()
        else:
            lo, hi = torch.aminmax(rows)
            self._check_finite(lo, hi)
        self._range = _merged(self._range, lo.float(), hi.float())

    def _update_sample(self, rows: Tensor) -> None:
        self._sample_for(rows.shape[-1], rows.device).add(rows)

    def _pass_over_sample(self, call: Call) -> None:
        self._sample_for(call.channels, call.device).pass_over(call.values)

    def _sample_for(self, channels: int, device: torch.device) -> Reservoir:
        if self._reservoir is None:
            fitting = max(1, ROW_BUDGET * self.reservoir_values // channels)
            capacity = min(self.reservoir_rows, fitting) if self.tracks_channels else self.reservoir_values
            shape = (channels,) if self.tracks_channels else ()
            self._reservoir = Reservoir(capacity, shape, seed=self.seed, device=device)
        return self._reservoir

    def _check_finite(self, lo: Tensor, hi: Tensor) -> None:
        """The extremes tell: NaN and infinity both propagate into them."""
        if not bool(torch.isfinite(lo.sum() + hi.sum())) and not bool((lo.isfinite() & hi.isfinite()).all()):
            raise CalibrationError(
                f"{self._name()} saw values that are not finite",
                found="NaN" if bool(lo.isnan().any()) else "infinity",
                expected="finite activations",
                remedy="check the calibration images, and run the float model in float32 or bfloat16, not float16",
            )

    def _nothing_seen(self) -> CalibrationError:
        return CalibrationError(
            f"{self._name()} has seen no data",
            remedy="run calibration data through the prepared model; a site that is never reached can be excluded",
        )

    def _name(self) -> str:
        return f"The observer of {self.site_name}" if self.site_name else "This observer"


def _channel_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over every axis but the last, float32 `[K]`."""
    if rows.dim() == 1:
        return rows.float(), rows.float()
    axes = tuple(range(rows.dim() - 1))
    if not rows.is_contiguous():
        return rows.amin(axes).float(), rows.amax(axes).float()
    rows = rows.view(-1, rows.shape[-1])
    # Reducing many short rows is several times slower than reducing few long ones: lay neighbours side by side first.
    height, width = rows.shape
    fold = max(1, 1024 // width)
    even = height - height % fold
    wide, rest = rows[:even].view(-1, fold * width), rows[even:]
    parts = [rest] if even == 0 else [wide.amin(0).view(fold, width), wide.amax(0).view(fold, width), rest]
    few = torch.cat(parts)
    return few.amin(0).float(), few.amax(0).float()


def _over_ranks(
    own: tuple[Tensor, Tensor] | None, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over the ranks; `own` is None on one that saw nothing."""
    lo, hi = own or (torch.full(shape, math.inf, device=device), torch.full(shape, -math.inf, device=device))
    return all_min(lo), all_max(hi)


def _merged(old: tuple[Tensor, Tensor] | None, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    if old is None:
        return lo, hi
    return torch.minimum(old[0], lo.to(old[0].device)), torch.maximum(old[1], hi.to(old[1].device))
