"""Presets: settings of harmonization by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.settings import Rates, RefineSettings


@dataclass(frozen=True)
class HarmonizeSettings:
    """Settings of :func:`harmonize`.

    Args:
        algorithm: Settings of Algorithm 1, or None to leave it out.
        refine: Settings of refinement, or None to leave it out.
        crops: Number of calibration crops it is meant for.
        crop_size: Their side in low-resolution pixels.
        held_out: Number of crops of other images that choose the state to keep.
    """

    algorithm: AlgorithmSettings | None = field(default_factory=AlgorithmSettings)
    refine: RefineSettings | None = field(default_factory=RefineSettings)
    crops: int = 32
    crop_size: int = 64
    held_out: int = 8

    @property
    def steps(self) -> int:
        """Gradient steps of the refinement."""
        return 0 if self.refine is None else self.refine.total_steps


SLOW = Rates(bounds=5e-3, scales=5e-3, weights=2.24e-2)
"""For thousands of steps, over which ranges need not hurry and weights have time to move."""

PRESETS: dict[str, HarmonizeSettings] = {
    "none": HarmonizeSettings(None, None),
    "algorithm": HarmonizeSettings(AlgorithmSettings(images=4), None),
    "fast": HarmonizeSettings(None, RefineSettings(steps=280, batch_size=2, checks=1), crops=24, held_out=4),
    "tables": HarmonizeSettings(None, RefineSettings(steps=100)),
    "standard": HarmonizeSettings(None, RefineSettings(steps=600, checks=8), crops=64),
    "long": HarmonizeSettings(None, RefineSettings(steps=2200, focus=0.5, checks=10, rates=SLOW), crops=256),
    "best": HarmonizeSettings(
        None,
        RefineSettings(
            steps=6000, batch_size=8, crop_size=64, checks=24, warm_up=100, precision="bfloat16", rates=SLOW
        ),
        crops=400,
        held_out=16,
    ),
}
"""`none`: calibration only. `algorithm`: Algorithm 1 alone. `fast`: about 4 minutes on two CPU cores for DAT-light x2.
`tables`: what every method that learns was given for the tables of `docs/results`, 100 steps of 4 images. `standard`:
about 20 minutes. `long`: about an hour. `best`: for a GPU.

Refinement starts from the calibrated joint scales and shifts, not from Algorithm 1, after which it starts higher and
ends no higher (docs/results/additions-x2.md).

`fast` takes steps of 2 images: they are hardly worse than steps of 4, and more of them fit in a minute."""


def preset(name: str) -> HarmonizeSettings:
    """The preset of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in PRESETS:
        raise ConfigError("Unknown preset", found=name, expected=", ".join(PRESETS))
    return PRESETS[name]
