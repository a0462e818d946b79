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
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from harmoq_ao.calibration.solve import disable_observers, enable_fake_quant
from harmoq_ao.common import distributed
from harmoq_ao.common.errors import CalibrationError, CheckpointError, ConfigError
from harmoq_ao.harmonization.blockwise import BlockErrors, refine_blocks
from harmoq_ao.harmonization.conditioning import condition_weights
from harmoq_ao.harmonization.learner import Learner, Rates, trainable_rest
from harmoq_ao.harmonization.progress import open_progress
from harmoq_ao.harmonization.reference import float_reference, frozen, teacher
from harmoq_ao.harmonization.sampling import (
    allowed_side,
    check_crops,
    detailed_cut,
    image_batches,
    mirrored,
    sample_order,
)
from harmoq_ao.harmonization.stages import find_stages, first_tensor
from harmoq_ao.harmonization.state import Checkpoint, Progress
from harmoq_ao.quant.fused_rounding import fused_rounding
from harmoq_ao.sites.model import PreparedModel

Precision = Literal["float32", "bfloat16"]
_PEAK = 1.0  # images are in 0..1


@dataclass(frozen=True)
class RefineSettings:
    """How to refine.

    Args:
        steps: Gradient steps of a cycle.
        cycles: How often they are taken, each time from the state kept so far and from half the rates of the time
            before: a cosine with warm restarts (Loshchilov and Hutter 2017). Where one cycle has been run, another is
            what a run of twice the length would do in its second half, but from a better start.
        batch_size: Images of a step.
        crop_size: Side of the images in low-resolution pixels, cut from the crops at random places; None takes whole
            crops. Several small images are worth more than one large one at the same cost.
        cuts: How many such places are drawn for an image; the one with most detail is taken. The quantized network
            loses most on detail, and most places have little.
        rates: Learning rates.
        by_bits: Whether the rates are meant for 2 bits and shrink with the step of the quantizers
            (:meth:`Rates.at`), or are taken as they are.
        feature_weight: Weight of the features' error beside the output's mean absolute error.
        warm_up: Steps over which the rates rise from zero.
        block_steps: Gradient steps of every block, one block after the other, before those of the whole network
            (:func:`refine_block`); 0 leaves that stage out.
        block_images: Images of side `crop_size` whose way through a block is held at a time.
        conditioning: Strength of the proximal step that follows every gradient step and lowers the condition numbers of
            the weights (`conditioning.py`), before it shrinks with the learning rate; 0 leaves it out.
        checks: How often the held-out crops are looked at in a cycle, evenly over its steps; the best state is kept.
        precision: ``bfloat16`` runs the parts outside of the quantizers in mixed precision.
        fused: Have the arithmetic of the fake-quantizers of large operands, attention maps above all, compiled
            (`fused_rounding.py`) where there is a compiler: shorter steps after a wait of a few seconds. Two runs may
            end in different last digits.
        recompute: Recompute blocks in the backward pass (gradient checkpointing): less memory, a third more time.
        seed: Of the order of the crops and their mirroring.

    Raises:
        ConfigError: A value is out of range.
    """

    steps: int = 200
    cycles: int = 1
    batch_size: int = 4
    crop_size: int | None = 32
    cuts: int = 1
    rates: Rates = field(default_factory=Rates)
    by_bits: bool = True
    feature_weight: float = 0.05
    warm_up: int = 5
    block_steps: int = 0
    block_images: int = 32
    conditioning: float = 0.0
    checks: int = 8
    precision: Precision = "float32"
    fused: bool = False
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = {
            "steps": 1,
            "cycles": 1,
            "batch_size": 1,
            "cuts": 1,
            "warm_up": 0,
            "block_steps": 0,
            "block_images": 1,
            "checks": 1,
            "seed": 0,
        }
        for name, least in numbers.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} of refinement is out of range", found=value, expected=f"{least} or more")
        if self.crop_size is not None and (type(self.crop_size) is not int or self.crop_size < 1):
            raise ConfigError("crop_size of refinement is out of range", found=self.crop_size, expected="1 or more")
        if self.precision not in get_args(Precision):
            raise ConfigError("Unknown precision", found=self.precision, expected=get_args(Precision))
        for name in ("feature_weight", "conditioning"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is out of range", found=getattr(self, name), expected="0 or more")

    @property
    def total_steps(self) -> int:
        """Gradient steps of all cycles, without those of the block-wise stage."""
        return self.steps * self.cycles


@dataclass
class RefineTrace:
    """What happened.

    Args:
        losses: Training loss of every step.
        held_out: Fidelity to the float network on the held-out crops as (steps done, PSNR in dB).
        best_step: Steps done when the kept state was reached.
        blocks: What the block-wise stage, if there was one, did to each block.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    blocks: list[BlockErrors] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "blocks": [list(errors) for errors in self.blocks]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RefineTrace:
        """Inverse of :meth:`to_dict`."""
        held_out = [(int(step), float(psnr)) for step, psnr in data["held_out"]]
        blocks = [BlockErrors(str(name), float(before), float(after)) for name, before, after in data.get("blocks", [])]
        return cls(list(map(float, data["losses"])), held_out, int(data["best_step"]), blocks)


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

    First block by block, if the settings say so (`blockwise.py`), then the whole network.

    The loss of a crop is ``mean |y~ - y| + feature_weight * mean_l ||f~_l - f_l||^2 / Var(f_l)`` over the outputs `f_l`
    of the blocks (:func:`find_stages`), with the float network's `y`, `f_l` as targets.

    Of several ranks (`common.distributed`) each is given the same crops and computes its share of every batch; the
    gradients are added up. Losses and gradients are those of a single process but for the order of float32 sums. The
    first rank writes the checkpoint, and all resume from it, also in another number.

    Args:
        prepared: Calibrated; changed in place.
        crops: Low-resolution images `[C, S, S]` in 0..1, of one size.
        settings: How; the default if None.
        held_out: Images like `crops` that are not learned from: the state that is best on them is kept, the one
            before the first step through the whole network included. Without any, the last state is kept.
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
    check_crops(crops)
    distributed.broadcast_state(prepared)
    float_reference(prepared)  # before any weight changes
    enable_fake_quant(prepared)
    disable_observers(prepared)
    with frozen(prepared), fused_rounding(settings.fused):
        store = Checkpoint(checkpoint, {"refine": asdict(settings), "crops": len(crops), "held_out": len(held_out)})
        found = _same_everywhere(store.load(), prepared)
        start = _refine_blocks(prepared, crops, settings, store, found, show_progress)
        run = _Refinement(prepared, crops, settings, held_out, start)
        run.resume(found)
        every = max(1, settings.steps // settings.checks)
        with open_progress("Refining", settings.total_steps, run.learner.steps_done, show_progress) as report:
            while run.learner.steps_done < settings.total_steps:
                run.step()
                done = run.learner.steps_done
                if done % settings.steps % every == 0:  # the end of a cycle is one
                    run.check()
                    if done % settings.steps == 0 and done < settings.total_steps:
                        run.restart()
                    run.save(store)
                report(done, run.describe())
        run.finish()
    return run.trace


class _Start(NamedTuple):
    """What the block-wise stage left, and what is saved to come back to it: parameters as ``start/NAME``."""

    blocks: list[BlockErrors]
    tensors: dict[str, Tensor]


def _refine_blocks(
    prepared: PreparedModel,
    crops: Sequence[Tensor],
    settings: RefineSettings,
    store: Checkpoint,
    found: Progress | None,
    show_progress: bool | None,
) -> _Start:
    """The block-wise stage, if there is one, from where a checkpoint has got to."""
    if not settings.block_steps:
        return _Start([], {})
    tensors, data = found or ({}, {"trace": RefineTrace().to_dict()})
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            parameter.copy_(tensors.get(f"start/{name}", parameter))

    def state() -> dict[str, Tensor]:
        return {f"start/{name}": parameter.detach().clone() for name, parameter in prepared.named_parameters()}

    def save(errors: list[BlockErrors]) -> None:
        if distributed.is_first():
            store.save(state(), {"trace": RefineTrace(blocks=errors).to_dict(), "step": None})

    images = (settings.block_images, settings.batch_size, settings.crop_size, settings.seed)
    blocks = refine_blocks(
        prepared,
        image_batches(prepared, crops, *images),
        _rates(prepared, settings),
        settings.block_steps,
        seed=settings.seed,
        done=RefineTrace.from_dict(data["trace"]).blocks,
        after_block=save,
        show_progress=show_progress,
    )
    return _Start(blocks, state())


def _same_everywhere(found: Progress | None, prepared: PreparedModel) -> Progress | None:
    """Raise unless all ranks go on from the same place."""
    place = [-1, -1]
    if found is not None:
        place = [len(found[1]["trace"].get("blocks", ())), -1 if found[1]["step"] is None else int(found[1]["step"])]
    device = next(prepared.parameters()).device
    places = [p.tolist() for p in distributed.all_gather(torch.tensor(place, device=device))]
    if any(other != places[0] for other in places):
        raise CheckpointError(
            "The ranks do not find the same checkpoint",
            found=f"blocks and steps {places} (-1 is none)",
            expected="one file that all of them read",
            remedy="choose an output on a file system that all ranks share",
        )
    return found


class _Refinement:
    """State of one refinement."""

    def __init__(
        self,
        prepared: PreparedModel,
        crops: Sequence[Tensor],
        settings: RefineSettings,
        held_out: Sequence[Tensor],
        start: _Start,
    ) -> None:
        self.prepared, self.settings, self.start = prepared, settings, start
        self.reference = teacher(prepared)
        self.crops, self.held_out = crops, held_out
        self.side = None if settings.crop_size is None else allowed_side(prepared, settings.crop_size)
        self.like = next(p for p in prepared.parameters() if p.is_floating_point())
        rest = trainable_rest(prepared.model, prepared.sites())
        rates = _rates(prepared, settings)
        self.learner = Learner(
            prepared.sites(),
            rates,
            settings.steps,
            cycles=settings.cycles,
            rest=rest,
            warm_up=settings.warm_up,
            shared=True,
        )
        self.blocks = [stage.name for stage in find_stages(prepared)] if settings.feature_weight else []
        self.trace = RefineTrace(blocks=start.blocks)
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
        pace = self.learner.pace
        self.learner.step(loss)
        if self.settings.conditioning:
            condition_weights(self.prepared.sites(), self.settings.conditioning * pace)

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

    def restart(self) -> None:
        """Begin the next cycle from the kept state."""
        self.learner.restart(self.best[1] if self.held_out else self.learner.snapshot())

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

    def resume(self, found: Progress | None) -> None:
        """Go on from a checkpoint, or look at where things start."""
        if found is None or found[1]["step"] is None:
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
        tensors |= self.start.tensors
        store.save(tensors, {"trace": self.trace.to_dict(), "best": self.best[0], "step": self.learner.steps_done})

    def _images(self, step: int) -> list[Tensor]:
        """This rank's share of the images of a step."""
        size, count = self.settings.batch_size, len(self.crops)
        chosen = [sample_order(count, self.settings.seed, step * size + i) for i in range(size)]
        images = [mirrored(self.crops[index], turn) for index, turn in chosen]
        if self.side is not None:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + 7919 * step)
            images = [detailed_cut(image, self.side, self.settings.cuts, generator) for image in images]
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


def _rates(prepared: PreparedModel, settings: RefineSettings) -> Rates:
    """Learning rates for the fewest bits of the model's quantizers."""
    bits = min((q.spec.bits for site in prepared.sites() for q in site.quantizers()), default=8)
    return settings.rates.at(bits) if settings.by_bits else settings.rates


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
