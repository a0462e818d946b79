"""The optimizer of refinement: ranges, scales, weights and the rest, each kind at its own relative rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harmoq_ao.common.distributed import is_distributed, sum_gradients
from harmoq_ao.harmonization.settings import Rates
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.joint_scale import SCALE_LIMITS
from harmoq_ao.sites.base import PreparedSite

MIN_RANGE = 1e-3
"""Smallest quantization range, as a share of the range at the start."""
_ADAM_STATE = ("exp_avg", "exp_avg_sq")


class Learner:
    """Adam with a cosine schedule over the ranges, joint scales, weights and other parameters of some sites.

    Joint scales are learned as logarithms, so that they stay positive, and kept within
    :data:`SCALE_LIMITS`; ranges keep a width (a projection after each step). Ranges of 8-bit
    weights are not learned: their codes are signed, with the middle one at zero.

    Args:
        sites: The sites.
        rates: Learning rates.
        steps: Length of the schedule.
        cycles: Repetitions of the schedule, each at half the rates of the one before.
        rest: Further parameters, by name.
        warm_up: Steps over which the rates rise from zero.
        max_norm: Largest global norm of the gradients; beyond it they are scaled down.
        shared: Sum the gradients over all ranks (`harmoq_ao.common.distributed`); the loss of a step is a sum as well.
    """

    def __init__(
        self,
        sites: Iterable[PreparedSite],
        rates: Rates,
        steps: int,
        *,
        cycles: int = 1,
        rest: Iterable[tuple[str, nn.Parameter]] = (),
        warm_up: int = 0,
        max_norm: float = 1.0,
        shared: bool = False,
    ) -> None:
        self.sites = list(sites)
        self._rates = rates
        self._max_norm = max_norm
        self._shared = shared and is_distributed()
        self._named: dict[str, nn.Parameter] = {}
        self._known: set[nn.Parameter] = set()
        self._logs: dict[str, tuple[PreparedSite, nn.Parameter]] = {}
        self._gaps: list[tuple[HarmoqFakeQuantize, Tensor]] = []
        self._groups: dict[float, list[nn.Parameter]] = {}
        for site in self.sites:
            self._add_bounds(site)
            self._add_scale(site)
            self._add_weight(site)
        self._add_rest(rest)
        groups = [{"params": parameters, "lr": rate} for rate, parameters in self._groups.items()]
        self._optimizer = torch.optim.Adam(groups, fused=True) if groups else None
        self._schedule = _Schedule(max(1, steps), warm_up, cycles)
        self.steps_done = 0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The learned parameters by name; joint scales as their logarithms."""
        return dict(self._named)

    @property
    def pace(self) -> float:
        """Factor of the learning rates in the next step, 0..1."""
        return self._schedule(self.steps_done)

    def step(self, loss: Tensor) -> None:
        """Back-propagate `loss` and update the parameters."""
        if self._optimizer is None:
            self.steps_done += 1
            return
        self._optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad or not self._shared:  # a rank may have no image in this step
            loss.backward()
        for site, log in self._logs.values():
            scale = site.joint_scale
            assert scale is not None
            log.grad = None if scale.grad is None else scale.grad * scale.detach()
            scale.grad = None
        if self._shared:
            sum_gradients(self._named.values())
        torch.nn.utils.clip_grad_norm_(self._named.values(), self._max_norm, foreach=True)
        factor = self.pace
        for group, rate in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        self.steps_done += 1
        self._project()

    def finish(self) -> None:
        """Freeze the learned parameters."""
        for parameter in self._named.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for site, _ in self._logs.values():
            if site.joint_scale is not None:
                site.joint_scale.requires_grad_(False)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the parameters."""
        return {name: parameter.detach().clone() for name, parameter in self._named.items()}

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Return to a snapshot."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(snapshot[name])
        self._project()

    def restart(self, snapshot: dict[str, Tensor]) -> None:
        """Start the next cycle from a snapshot, with fresh moments of Adam."""
        self.restore(snapshot)
        if self._optimizer is not None:
            self._optimizer.state.clear()

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments of Adam, to resume from."""
        state = {f"now/{name}": tensor for name, tensor in self.snapshot().items()}
        for name, parameter in self._named.items():
            moments = {} if self._optimizer is None else self._optimizer.state.get(parameter, {})
            for key in (*_ADAM_STATE, "step"):
                if key in moments:
                    state[f"{key}/{name}"] = moments[key].detach().clone()
        return state

    def load_state(self, state: dict[str, Tensor], steps_done: int) -> None:
        """Inverse of :meth:`state`."""
        self.restore({name: state[f"now/{name}"] for name in self._named})
        self.steps_done = steps_done
        if self._optimizer is None:
            return
        for name, parameter in self._named.items():
            if f"step/{name}" not in state:
                continue
            moments = {key: state[f"{key}/{name}"].to(parameter) for key in _ADAM_STATE}
            self._optimizer.state[parameter] = {**moments, "step": state[f"step/{name}"].clone()}

    # --- what is learned ---------------------------------------------------------------------------------------------

    def _learn(self, name: str, parameter: Tensor, rate: float) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter in self._known:
            return  # a weight that two sites share
        self._known.add(parameter)
        parameter.requires_grad_(True)
        self._named[name] = parameter
        self._groups.setdefault(_common(rate), []).append(parameter)

    def _add_bounds(self, site: PreparedSite) -> None:
        if self._rates.bounds == 0:
            return
        for side, quantizer in (("left", site.act_quantizer), ("right", site.weight_quantizer)):
            if quantizer is None or quantizer.spec.dynamic or not quantizer.learnable:
                continue
            width = (quantizer.upper - quantizer.lower).detach()
            rate = self._rates.bounds * float(width.mean())
            self._gaps.append((quantizer, width.clamp_min(1e-8) * MIN_RANGE))
            self._learn(f"{site.site.path}.{side}.upper", quantizer.upper, rate)
            if quantizer.lower_ratio is None:  # else it follows the upper one
                self._learn(f"{site.site.path}.{side}.lower", quantizer.lower, rate)

    def _add_scale(self, site: PreparedSite) -> None:
        if self._rates.scales == 0 or site.joint_scale is None:
            return
        name = f"{site.site.path}.log_scale"
        log = nn.Parameter(site.joint_scale.detach().clamp(*SCALE_LIMITS).log())
        self._logs[name] = (site, log)
        self._learn(name, log, self._rates.scales)
        site.joint_scale.requires_grad_(True)
        if site.joint_shift is not None and site.act_quantizer is not None:
            width = (
                site.act_quantizer.upper - site.act_quantizer.lower
            ).detach().mean() * site.joint_scale.detach().mean()
            self._learn(f"{site.site.path}.joint_shift", site.joint_shift, self._rates.scales * float(width))

    def _add_weight(self, site: PreparedSite) -> None:
        weight, bias = site.own_weight, site.own_bias
        if self._rates.weights == 0 or weight is None:
            return
        rate = self._rates.weights * _spread(weight)
        self._learn(f"{site.site.path}.weight", weight, rate)
        if bias is not None:
            self._learn(f"{site.site.path}.bias", bias, rate)

    def _add_rest(self, rest: Iterable[tuple[str, nn.Parameter]]) -> None:
        if self._rates.rest == 0:
            return
        own = {id(p) for site in self.sites for p in site.parameters()}
        for name, parameter in rest:
            if id(parameter) not in own and parameter.is_floating_point():
                self._learn(name, parameter, self._rates.rest * _spread(parameter))

    # --- staying feasible --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _project(self) -> None:
        for quantizer, gap in self._gaps:
            ratio = quantizer.lower_ratio
            if ratio is not None:
                quantizer.upper.copy_(torch.maximum(quantizer.upper, gap / (1.0 + ratio)))
                quantizer.lower.copy_(-ratio * quantizer.upper)
                continue
            missing = (gap - (quantizer.upper - quantizer.lower)).clamp_min(0)
            quantizer.upper.add_(missing / 2)
            quantizer.lower.sub_(missing / 2)
        low, high = (math.log(limit) for limit in SCALE_LIMITS)
        for _, log in self._logs.values():
            log.clamp_(low, high)
        self._spread_scales()

    @torch.no_grad()
    def _spread_scales(self) -> None:
        for site, log in self._logs.values():
            assert site.joint_scale is not None
            site.joint_scale.copy_(log.exp())


def _common(rate: float) -> float:
    """The nearest of eight rates per octave, so that parameters of like rates are updated in one call."""
    return 2.0 ** (round(8 * math.log2(rate)) / 8) if rate > 0 else 0.0


def _spread(parameter: Tensor) -> float:
    """Standard deviation of a parameter; a share of its mean magnitude where it hardly varies; never zero."""
    values = parameter.detach().float()
    deviation = float(values.std()) if values.numel() > 1 else 0.0
    return max(deviation, 0.01 * float(values.abs().mean()), 1e-6)


@dataclass(frozen=True)
class _Schedule:
    """Linear warm-up, then half a cosine down to zero; every further cycle the same at half the height."""

    steps: int
    warm_up: int
    cycles: int = 1

    def __call__(self, step: int) -> float:
        cycle = min(step // self.steps, self.cycles - 1)
        step -= cycle * self.steps
        rising = min(1.0, (step + 1) / (self.warm_up + 1))
        return 0.5**cycle * rising * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self.steps)))


def trainable_rest(model: nn.Module, sites: Sequence[PreparedSite]) -> list[tuple[str, nn.Parameter]]:
    """Parameters of `model` that belong to no site, by name."""
    own = {id(p) for site in sites for p in site.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in own]
