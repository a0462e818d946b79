"""Refinement that sees the image: the whole quantized network is drawn to the float network's output and features.

No labels: low-resolution images are enough. What is learned keeps the integer kernels: static bounds, joint scales that
divide them, weights that are rounded afterwards, and, if asked for, the parameters that stay in float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from harmoq_ao import distributed
from harmoq_ao.calibrate import disable_observers, enable_fake_quant
from harmoq_ao.errors import CalibrationError, CheckpointError, ConfigError
from harmoq_ao.harmonize.learner import Learner, Rates, trainable_rest
from harmoq_ao.harmonize.progress import open_progress
from harmoq_ao.harmonize.reference import float_reference, frozen
from harmoq_ao.harmonize.stages import find_stages, first_tensor
from harmoq_ao.harmonize.state import Checkpoint, Progress
from harmoq_ao.prepare import PreparedModel

Precision = Literal["float32", "bfloat16"]
_PEAK = 1.0  # images are in 0..1
_DIHEDRAL = 8


@dataclass(frozen=True)
class RefineSettings:
    """How to refine.

    Args:
        steps: Gradient steps.
        batch_size: Images of a step.
        crop_size: Side of the images in low-resolution pixels, cut from the crops at random places; None takes whole
            crops. Several small images are worth more than one large one at the same cost.
        rates: Learning rates.
        by_bits: Whether the rates are meant for 2 bits and shrink with the step of the quantizers
            (:meth:`~harmoq_ao.harmonize.learner.Rates.at`), or are taken as they are.
        feature_weight: Weight of the features' error beside the output's mean absolute error.
        warm_up: Steps over which the rates rise from zero.
        checks: How often the held-out crops are looked at, evenly over the steps; the best state is kept.
        precision: ``bfloat16`` runs the parts outside of the quantizers in mixed precision.
        recompute: Recompute blocks in the backward pass (gradient checkpointing): less memory, a third more time.
        seed: Of the order of the crops and their mirroring.

    Raises:
        ConfigError: A value is out of range.
    """

    steps: int = 200
    batch_size: int = 4
    crop_size: int | None = 32
    rates: Rates = field(default_factory=Rates)
    by_bits: bool = True
    feature_weight: float = 0.05
    warm_up: int = 5
    checks: int = 8
    precision: Precision = "float32"
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warm_up", 0), ("checks", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} of refinement is out of range", found=value, expected=f"{least} or more")
        if self.crop_size is not None and (type(self.crop_size) is not int or self.crop_size < 1):
            raise ConfigError("crop_size of refinement is out of range", found=self.crop_size, expected="1 or more")
        if self.precision not in get_args(Precision):
            raise ConfigError("Unknown precision", found=self.precision, expected=get_args(Precision))
        if not 0 <= self.feature_weight < math.inf:
            raise ConfigError("feature_weight is out of range", found=self.feature_weight, expected="0 or more")


@dataclass
class RefineTrace:
    """What happened.

    Args:
        losses: Training loss of every step.
        held_out: Fidelity to the float network on the held-out crops as (steps done, PSNR in dB).
        best_step: Steps done when the kept state was reached.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RefineTrace:
        """Inverse of :meth:`to_dict`."""
        held_out = [(int(step), float(psnr)) for step, psnr in data["held_out"]]
        return cls(list(map(float, data["losses"])), held_out, int(data["best_step"]))


def refine(
    prepared: PreparedModel,
    crops: Sequence[Tensor],
    settings: RefineSettings | None = None,
    *,
    held_out: Sequence[Tensor] = (),
    checkpoint: Path | None = None,
    show_progress: bool | None = None,
) -> RefineTrace:
    """Learn bounds, joint scales and weights of a calibrated model so that it computes what the float network does.

    The loss of a crop is ``mean |y~ - y| + feature_weight * mean_l ||f~_l - f_l||^2 / Var(f_l)`` over the outputs `f_l`
    of the blocks (:func:`~harmoq_ao.harmonize.stages.find_stages`), with the float network's `y`, `f_l` as targets.

    Of several ranks (`harmoq_ao.distributed`) each is given the same crops and computes its share of every batch; the
    gradients are added up. Losses and gradients are those of a single process but for the order of float32 sums. The
    first rank writes the checkpoint, and all resume from it, also in another number.

    Args:
        prepared: Calibrated; changed in place.
        crops: Low-resolution images `[C, S, S]` in 0..1, of one size.
        settings: How; the default if None.
        held_out: Images like `crops` that are not learned from: the state that is best on them is kept, the first
            included. Without any, the last state is kept.
        checkpoint: File to resume from, if it exists, and to save the progress in.
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Returns:
        Losses, and the fidelity on the held-out crops.

    Raises:
        CalibrationError: No crops, crops of different sizes, no bounds yet, or a loss that is not finite.
        CheckpointError: The checkpoint belongs to another model or other settings, or not every rank can read it.
        RankLostError: Another rank failed.
    """
    settings = settings or RefineSettings()
    _check_crops(crops)
    distributed.broadcast_state(prepared)
    enable_fake_quant(prepared)
    disable_observers(prepared)
    with frozen(prepared):
        run = _Refinement(prepared, crops, settings, held_out)
        store = Checkpoint(checkpoint, {"refine": asdict(settings), "crops": len(crops), "held_out": len(held_out)})
        run.resume(store)
        every = max(1, settings.steps // settings.checks)
        with open_progress("Refining", settings.steps, run.learner.steps_done, show_progress) as report:
            while run.learner.steps_done < settings.steps:
                run.step()
                done = run.learner.steps_done
                if done % every == 0 or done == settings.steps:
                    run.check()
                    run.save(store)
                report(done, run.describe())
        run.finish()
    return run.trace


class _Refinement:
    """State of one refinement."""

    def __init__(
        self, prepared: PreparedModel, crops: Sequence[Tensor], settings: RefineSettings, held_out: Sequence[Tensor]
    ) -> None:
        self.prepared, self.settings = prepared, settings
        self.reference = float_reference(prepared)
        self.crops, self.held_out = crops, held_out
        self.side = None if settings.crop_size is None else allowed_side(prepared, settings.crop_size)
        self.like = next(p for p in prepared.parameters() if p.is_floating_point())
        rest = trainable_rest(prepared.model, prepared.sites()) if settings.rates.rest else ()
        rates = settings.rates.at(_fewest_bits(prepared)) if settings.by_bits else settings.rates
        self.learner = Learner(
            prepared.sites(), rates, settings.steps, rest=rest, warm_up=settings.warm_up, shared=True
        )
        self.blocks = [stage.name for stage in find_stages(prepared)] if settings.feature_weight else []
        self.trace = RefineTrace()
        self.best = (-math.inf, self.learner.snapshot())

    def step(self) -> None:
        """One gradient step."""
        with distributed.own_share():
            loss = self._loss(self._images(self.learner.steps_done))
        value = float(distributed.all_sum(loss.detach()))
        if not math.isfinite(value):
            raise CalibrationError(
                f"The loss is not finite at step {self.learner.steps_done}",
                found=value,
                remedy="lower the learning rates, or check the calibration images",
            )
        self.trace.losses.append(value)
        self.learner.step(loss)

    def _loss(self, images: list[Tensor]) -> Tensor:
        """What the images of this rank add to the loss of the batch."""
        share = len(images) / self.settings.batch_size
        wanted: dict[str, Tensor] = {}
        if images:
            batch = torch.stack(images).to(self.like)
            with torch.no_grad(), features_of(self.reference, self.blocks) as wanted:
                target = first_tensor(self.reference(batch))
        variances = shared_variances(wanted, self.blocks, self.like) if distributed.is_distributed() else None
        if not images:
            return torch.zeros((), device=self.like.device)
        with self._mixed(batch), self._recomputing(), features_of(self.prepared, self.blocks) as reached:
            output = first_tensor(self.prepared(batch))
        loss = (output.float() - target.float()).abs().mean()
        if self.blocks:
            loss = loss + self.settings.feature_weight * feature_error(reached, wanted, variances)
        return loss if share == 1 else loss * share

    def check(self) -> None:
        """Measure the held-out crops and remember the state if it is the best so far."""
        if not self.held_out:
            self.trace.best_step = self.learner.steps_done
            return
        psnr = self._held_out_psnr()
        self.trace.held_out.append((self.learner.steps_done, psnr))
        if psnr > self.best[0]:
            self.best = (psnr, self.learner.snapshot())
            self.trace.best_step = self.learner.steps_done

    def finish(self) -> None:
        """Leave the kept state in the model."""
        if self.held_out:
            self.learner.restore(self.best[1])
        self.learner.finish()

    def describe(self) -> str:
        """Progress in words."""
        recent = self.trace.losses[-10:]
        text = f"loss {sum(recent) / len(recent):.5f}"
        return text + (f", held out {self.trace.held_out[-1][1]:.2f} dB" if self.trace.held_out else "")

    def resume(self, store: Checkpoint) -> None:
        """Go on from a checkpoint, or look at where things start."""
        found = self._checked(store.load())
        if found is None:
            self.check()
            return
        tensors, data = found
        self.trace = RefineTrace.from_dict(data["trace"])
        self.best = (
            float(data["best"]),
            {n: tensors[f"best/{n}"].to(self.like.device) for n in self.learner.parameters},
        )
        self.learner.load_state(tensors, int(data["step"]))

    def save(self, store: Checkpoint) -> None:
        """Write everything that :meth:`resume` needs."""
        if not distributed.is_first():
            return
        tensors = self.learner.state() | {f"best/{name}": tensor for name, tensor in self.best[1].items()}
        store.save(tensors, {"trace": self.trace.to_dict(), "best": self.best[0], "step": self.learner.steps_done})

    def _images(self, step: int) -> list[Tensor]:
        """This rank's share of the images of a step."""
        size, count = self.settings.batch_size, len(self.crops)
        chosen = [sample_order(count, self.settings.seed, step * size + i) for i in range(size)]
        images = [mirrored(self.crops[index], turn) for index, turn in chosen]
        if self.side is not None:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + 7919 * step)
            images = [random_cut(image, self.side, generator) for image in images]
        return [image for index, image in enumerate(images) if distributed.is_mine(index)]

    @cached_property
    def _targets(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's share of the held-out images, and the float network's outputs."""
        own = [image for index, image in enumerate(self.held_out) if distributed.is_mine(index)]
        with torch.no_grad():
            return [(image, first_tensor(self.reference(image[None].to(self.like)))) for image in own]

    def _held_out_psnr(self) -> float:
        """Mean over all held-out images, added up in their order whoever measured them."""
        size = distributed.world_size()
        measured = torch.zeros(math.ceil(len(self.held_out) / size), dtype=torch.float64, device=self.like.device)
        with distributed.own_share():
            for index, target in enumerate(self._targets):
                measured[index] = held_out_psnr(self.prepared, [target], self.like)
        everyone = torch.stack(distributed.all_gather(measured), 1).flatten().tolist()
        return sum(everyone[: len(self.held_out)]) / len(self.held_out)

    def _checked(self, found: Progress | None) -> Progress | None:
        """Raise unless all ranks go on from the same step."""
        step = -1 if found is None else int(found[1]["step"])
        steps = [int(s) for s in distributed.all_gather(torch.tensor([step], device=self.like.device))]
        if len(set(steps)) > 1:
            raise CheckpointError(
                "The ranks do not find the same checkpoint",
                found=f"steps {steps} (-1 is no file)",
                expected="one file that all of them read",
                remedy="choose an output on a file system that all ranks share",
            )
        return found

    def _mixed(self, batch: Tensor) -> Any:
        return torch.autocast(batch.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        modules = [self.prepared.model.get_submodule(name) for name in self.blocks] if self.settings.recompute else []
        for module in modules:
            module.forward = partial(checkpointed, module.forward, use_reentrant=False)
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def _fewest_bits(prepared: PreparedModel) -> int:
    return min((q.spec.bits for site in prepared.sites() for q in site.quantizers()), default=8)


def _deviations(values: Tensor) -> Tensor:
    return (values.double() - values.double().mean()).square().sum()


# --- parts of it ------------------------------------------------------------------------------------------------------


@contextmanager
def features_of(model: PreparedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of submodules by name, filled while the model runs within; of several calls the last."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = first_tensor(output)

        return hook

    handles = [model.model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def feature_error(
    reached: dict[str, Tensor], wanted: dict[str, Tensor], variances: dict[str, Tensor] | None = None
) -> Tensor:
    """Mean over the features of ``||f~ - f||^2 / Var(f)``; the variances are those of `wanted` unless given."""
    errors = []
    for name, target in wanted.items():
        variance = target.float().var() if variances is None else variances[name]
        errors.append(F.mse_loss(reached[name].float(), target.float()) / variance.clamp_min(1e-12))
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


@torch.no_grad()
def held_out_psnr(prepared: PreparedModel, targets: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> float:
    """Mean PSNR in dB of the model's output against the float network's, both clamped to 0..1."""
    total = 0.0
    for image, target in targets:
        output = first_tensor(prepared(image[None].to(like))).float()
        error = float((output.clamp(0, 1) - target.float().clamp(0, 1)).double().square().mean())
        total += 10.0 * math.log10(_PEAK**2 / max(error, 1e-12))
    return total / len(targets)


def sample_order(count: int, seed: int, position: int) -> tuple[int, int]:
    """Which crop and which of the eight mirrorings stands at a position of the seeded, endless order."""
    epoch, place = divmod(position, count)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    turns = torch.randint(_DIHEDRAL, (count,), generator=generator)
    return int(order[place]), int(turns[place])


def mirrored(crop: Tensor, turn: int) -> Tensor:
    """One of the eight mirrorings and rotations of `[C, S, S]`; of another shape the four that keep it."""
    if turn & 1:
        crop = crop.flip(-1)
    if turn & 2:
        crop = crop.flip(-2)
    return crop.transpose(-1, -2) if turn & 4 and crop.shape[-1] == crop.shape[-2] else crop


def allowed_side(prepared: PreparedModel, side: int) -> int:
    """The smallest side from `side` on that the network takes, as far as its traits tell."""
    traits = prepared.traits
    return math.ceil(max(side, traits.size_minimum) / traits.size_multiple) * traits.size_multiple


def random_cut(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A part of `[C, H, W]`, `[C, side, side]` or as much as there is, at a random place."""
    height, width = (min(side, length) for length in image.shape[1:])
    top, left = (
        int(torch.randint(length - part + 1, (), generator=generator))
        for length, part in zip(image.shape[1:], (height, width), strict=True)
    )
    return image[:, top : top + height, left : left + width]


def _check_crops(crops: Sequence[Tensor]) -> None:
    if not len(crops):
        raise CalibrationError("There is nothing to refine on", found="0 crops", expected="at least one")
    shapes = {tuple(crop.shape) for crop in crops}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise CalibrationError(
            "The crops for refinement do not have one size",
            found=sorted(shapes)[:4],
            expected="[C, S, S], all the same",
            remedy="cut them with harmoq_ao.data.CalibrationCrops",
        )
