"""Refinement: the whole quantized network learns the float network's output and features.

No labels: low-resolution images are enough. What is learned keeps the integer kernels: static quantization ranges,
joint scales that divide them, weights that are rounded afterwards, and, if asked for, the parameters that stay in
float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.calibration.solve import disable_observers, enable_fake_quant
from harmoq_ao.common import distributed
from harmoq_ao.common.errors import CalibrationError, CheckpointError
from harmoq_ao.cpu_kernels import library
from harmoq_ao.harmonization.checkpoint import Checkpoint, Progress
from harmoq_ao.harmonization.distillation import feature_error, features_of, held_out_psnr, shared_variances
from harmoq_ao.harmonization.identity import work_identity
from harmoq_ao.harmonization.learner import Learner, trainable_rest
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.places import Places, added_detail
from harmoq_ao.harmonization.progress import open_progress
from harmoq_ao.harmonization.sampling import allowed_side, check_crops
from harmoq_ao.harmonization.settings import Rates, RefineSettings
from harmoq_ao.harmonization.stages import find_stages
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.harmonization.weights import frozen
from harmoq_ao.quant.operators import using
from harmoq_ao.sites.model import PreparedModel


@dataclass
class RefineTrace:
    """Record of a call of :func:`refine`.

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
    teacher: Teacher | None = None,
    held_out: Sequence[Tensor] = (),
    method: str = "harmoq",
    algorithm: AlgorithmSettings | None = None,
    checkpoint: Path | None = None,
    show_progress: bool | None = None,
) -> RefineTrace:
    """Learn quantization ranges, joint scales and weights of a calibrated model from the float network.

    The loss of a batch is ``mean |y~ - y| + feature_weight * mean_l ||f~_l - f_l||^2 / Var(f_l)`` over the outputs
    `f_l` of the blocks (:func:`find_stages`), with the float network's `y`, `f_l` as targets.

    In a process group (`common.distributed`) every rank is given the same crops and computes its share of every batch;
    the gradients are summed. Losses and gradients are those of a single process but for the order of float32 sums. The
    first rank writes the checkpoint, and all resume from it, also in another number.

    Args:
        prepared: Calibrated; changed in place.
        crops: Low-resolution images `[C, S, S]` in 0..1, of one size.
        settings: How to refine; the default if None.
        teacher: The float network. Needed where weights have changed since the model was prepared; by default it is
            made from `prepared` as it is.
        held_out: Images like `crops` that are not learned from: the state that is best on them is kept, the one before
            the first step included. Without any, the last state is kept.
        method: What the refinement is a part of: a checkpoint is of one method.
        algorithm: Settings of Algorithm 1, if it ran before: a checkpoint is of both.
        checkpoint: File to resume from, if it exists, and to save the progress in. It belongs to this method and these
            weights, images, bits and settings (:func:`work_identity`).
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Returns:
        Losses, and the fidelity on the held-out crops.

    Raises:
        CalibrationError: No crops, crops of different sizes, no bounds yet, or a loss that is not finite.
        CheckpointError: The checkpoint is of another method, other weights, images, bits or settings, or not every rank
            can read it.
        RankLostError: Another rank failed.
    """
    settings = settings or RefineSettings()
    check_crops(crops)
    distributed.broadcast_state(prepared)
    teacher = teacher or Teacher(prepared)
    enable_fake_quant(prepared)
    disable_observers(prepared)
    with frozen(prepared), using(library.kernels() if next(prepared.parameters()).is_cpu else None):
        work = {"method": method, "algorithm": algorithm and asdict(algorithm), "refinement": asdict(settings)}
        store = Checkpoint(checkpoint, work_identity(prepared, teacher, crops, held_out, work))
        places = _places(prepared, teacher, crops, settings, show_progress)
        run = _Refinement(prepared, teacher, places, settings, held_out)
        run.resume(_same_everywhere(store.load(), prepared))
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


def _same_everywhere(found: Progress | None, prepared: PreparedModel) -> Progress | None:
    """Raise unless all ranks resume from the same step."""
    step = -1 if found is None else int(found[1]["step"])
    device = next(prepared.parameters()).device
    steps = [int(s) for s in distributed.all_gather(torch.tensor([step], device=device))]
    if any(other != steps[0] for other in steps):
        raise CheckpointError(
            "The ranks do not find the same checkpoint",
            found=f"steps {steps} (-1 is none)",
            expected="one file that all of them read",
            remedy="choose an output on a file system that all ranks share",
        )
    return found


class _Refinement:
    """State of one call of :func:`refine`."""

    def __init__(
        self,
        prepared: PreparedModel,
        teacher: Teacher,
        places: Places,
        settings: RefineSettings,
        held_out: Sequence[Tensor],
    ) -> None:
        self.prepared, self.settings = prepared, settings
        self.reference = teacher.quick
        self.places, self.held_out = places, held_out
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
        """Contribution of this rank's images to the loss of the batch."""
        share = len(images) / self.settings.batch_size
        wanted: dict[str, Tensor] = {}
        if images:
            batch = torch.stack(images).to(self.like)
            with torch.no_grad(), features_of(self.reference, self.blocks) as wanted:
                target = self.reference.image(batch)
        variances = shared_variances(wanted, self.blocks, self.like) if distributed.is_distributed() else None
        if not images:
            return torch.zeros((), device=self.like.device)
        with self._mixed(batch), features_of(self.prepared, self.blocks) as reached:
            output = self.prepared.image(batch)
        loss = (output.float() - target.float()).abs().mean()
        if self.blocks:
            loss = loss + self.settings.feature_weight * feature_error(reached, wanted, variances)
        return loss if share == 1 else loss * share

    def check(self) -> None:
        """Measure the held-out crops and keep the state if it is the best so far."""
        if not self.held_out:
            self.trace.best_step = self.learner.steps_done
            return
        psnr = self._held_out_psnr()
        self.trace.held_out.append((self.learner.steps_done, psnr))
        if psnr > self.best[0]:
            self.best = (psnr, self.learner.snapshot())
            self.trace.best_step = self.learner.steps_done

    def restart(self) -> None:
        """Start the next cycle from the kept state."""
        self.learner.restart(self.best[1] if self.held_out else self.learner.snapshot())

    def finish(self) -> None:
        """Put the kept state into the model."""
        if self.held_out:
            self.learner.restore(self.best[1])
        self.learner.finish()

    def describe(self) -> str:
        """The present loss and fidelity, for the progress bar."""
        recent = self.trace.losses[-10:]
        text = f"loss {sum(recent) / len(recent):.5f}"
        return text + (f", held out {self.trace.held_out[-1][1]:.2f} dB" if self.trace.held_out else "")

    def resume(self, found: Progress | None) -> None:
        """Resume from a checkpoint, or measure the start."""
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
        """Write what :meth:`resume` needs."""
        tensors = self.learner.state() | {f"best/{name}": tensor for name, tensor in self.best[1].items()}
        store.save(tensors, {"trace": self.trace.to_dict(), "best": self.best[0], "step": self.learner.steps_done})

    def _images(self, step: int) -> list[Tensor]:
        """This rank's share of the images of a step."""
        images = self.places.draw(step, self.settings.batch_size)
        return [image for index, image in enumerate(images) if distributed.is_mine(index)]

    @cached_property
    def _targets(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's share of the held-out images, and the float network's outputs."""
        own = [image for index, image in enumerate(self.held_out) if distributed.is_mine(index)]
        with torch.no_grad():
            return [(image, self.reference.image(image[None].to(self.like))) for image in own]

    def _held_out_psnr(self) -> float:
        """Mean over all held-out images; summed in their order, whichever rank measured them, so that it is exact."""
        size = distributed.world_size()
        measured = torch.zeros(math.ceil(len(self.held_out) / size), dtype=torch.float64, device=self.like.device)
        with distributed.own_share():
            for index, target in enumerate(self._targets):
                measured[index] = held_out_psnr(self.prepared, [target], self.like)
        everyone = torch.stack(distributed.all_gather(measured), 1).flatten().tolist()
        return sum(everyone[: len(self.held_out)]) / len(self.held_out)

    def _mixed(self, batch: Tensor) -> Any:
        return torch.autocast(batch.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")


def _places(
    prepared: PreparedModel,
    teacher: Teacher,
    crops: Sequence[Tensor],
    settings: RefineSettings,
    show_progress: bool | None,
) -> Places:
    """The places that steps are taken on."""
    side = None if settings.crop_size is None else allowed_side(prepared, settings.crop_size)
    if settings.focus:
        worth = added_detail(teacher.quick, crops, show_progress)
    else:
        worth = torch.ones(len(crops), *crops[0].shape[1:])
    return Places(crops, worth, side, settings.focus, settings.seed)


def _rates(prepared: PreparedModel, settings: RefineSettings) -> Rates:
    """Learning rates for the fewest bits of the model's quantizers."""
    bits = min((q.spec.bits for site in prepared.sites() for q in site.quantizers()), default=8)
    return settings.rates.at(bits) if settings.by_bits else settings.rates
