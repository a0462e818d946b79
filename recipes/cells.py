"""Cells of a study: one method at one bit width, scale and profile, with everything else that decides its numbers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from harmoq_ao.baselines import BASELINES, GranularDQ
from harmoq_ao.baselines.methods import check_method
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig, Profile, SiteRule
from harmoq_ao.harmonization.presets import PRESETS, HarmonizeSettings, preset
from harmoq_ao.quant.quantizer import check_bits

FLOAT = "float"
BICUBIC = "bicubic"
HARMOQ = "harmoq"
REFERENCES = (BICUBIC, FLOAT)
"""Rows that quantize nothing."""
BY_PATCH = "by_patch"
"""Option of Granular-DQ: bits belong to patches."""
_SECTIONS = ("config", "algorithm", "refine", "crops", "crop_size", "held_out", BY_PATCH)

Value = bool | int | float | str | None
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One thing to quantize and measure.

    Args:
        method: A name of ``harmoq_ao.baselines.methods.METHODS``, or ``float`` or ``bicubic``.
        weight_bits: Of the weights; 32 is float.
        act_bits: Of the activations; 32 is float.
        scale: Upscaling factor.
        profile: ``paper`` or ``deploy``.
        preset: How much work HarmoQ and the learned baselines do.
        rules: Bits of single sites, as in :class:`HarmoqConfig`.
        options: Departures from the preset, by dotted name: ``config.joint_scale``, ``algorithm.projection``,
            ``refine.steps``; ``algorithm`` or ``refine`` set to None leaves that stage out.
        label: What a table calls this cell; it decides nothing.

    Raises:
        ConfigError: Bits out of range, or an option of no known section.
    """

    method: str
    weight_bits: int = 32
    act_bits: int = 32
    scale: int = 2
    profile: Profile = "paper"
    preset: str = "standard"
    rules: tuple[SiteRule, ...] = ()
    options: tuple[tuple[str, Value], ...] = ()
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_bits(self.weight_bits)
        check_bits(self.act_bits)
        object.__setattr__(self, "options", tuple(sorted(dict(self.options).items())))
        for name, _ in self.options:
            if name.partition(".")[0] not in _SECTIONS:
                raise ConfigError(
                    "Unknown option of a cell", found=name, expected=f"a name that starts with {', '.join(_SECTIONS)}"
                )

    @property
    def is_reference(self) -> bool:
        """Whether nothing is quantized."""
        return self.method in REFERENCES

    @property
    def by_patch(self) -> bool:
        """Whether bits belong to patches, so that there is only a simulation."""
        return bool(dict(self.options).get(BY_PATCH))

    @property
    def bits(self) -> str:
        """``W4A4``; empty for a reference."""
        return "" if self.is_reference else f"W{self.weight_bits}A{self.act_bits}"

    @property
    def name(self) -> str:
        """For people: method, bits, scale, and whatever else sets it apart."""
        parts = [self.label or self.method, self.bits, f"x{self.scale}"]
        return " ".join(part for part in parts if part)

    def with_options(self, options: Mapping[str, Value]) -> Cell:
        """The same cell with further options; the new ones win."""
        return replace(self, options=tuple((dict(self.options) | dict(options)).items()))

    def config(self, seed: int) -> HarmoqConfig:
        """The configuration before a method changes it.

        Raises:
            ConfigError: An option names no setting, or a value is outside its set.
        """
        base = HarmoqConfig(self.weight_bits, self.act_bits, self.profile, self.rules, seed=seed)
        own = {name.removeprefix("config."): v for name, v in self.options if name.startswith("config.")}
        return with_changes(base, own)

    def settings(self) -> HarmonizeSettings:
        """The preset with the cell's options applied; a setting of Algorithm 1 turns it on where the preset omits it.

        Raises:
            ConfigError: Unknown method, preset or option, or an option that the method does not read.
        """
        check_method(self.method)
        changes = {name: value for name, value in self.options if not name.startswith("config.")}
        by_patch = changes.pop(BY_PATCH, None)
        own = [name for name in changes if name.partition(".")[0] in ("algorithm", "refine")]
        if own and self.method != HARMOQ:
            raise ConfigError(f"{self.method} has no such option", found=own[0], expected="config.*, crops, crop_size")
        if by_patch and self.method != GranularDQ.name:
            raise ConfigError(f"{self.method} has no such option", found=BY_PATCH, expected=f"it at {GranularDQ.name}")
        base = preset(self.preset)
        if base.algorithm is None and any(name.startswith("algorithm.") for name in changes):
            base = replace(base, algorithm=PRESETS["algorithm"].algorithm)
        return with_changes(base, changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form of what decides the numbers; of a preset only what the method reads."""
        if self.is_reference:
            return {"method": self.method, "scale": self.scale}
        settings: dict[str, Any] = asdict(self.settings())
        if self.method != HARMOQ and not BASELINES[self.method].learns:
            settings = {name: settings[name] for name in ("crops", "crop_size")}
        plain = {name: value for name, value in asdict(self).items() if name != "label"}
        return {**plain, "options": dict(self.options), "settings": settings}

    def identity(self, surroundings: Mapping[str, Any]) -> str:
        """File name without suffix, unique to the cell and its surroundings (model, photographs, seed)."""
        parts = (self.method, self.bits.lower(), f"x{self.scale}", "" if self.is_reference else self.profile)
        name = "-".join(part for part in (*parts, digest({"cell": self.to_dict(), **surroundings})) if part)
        return re.sub(r"[^a-z0-9]+", "-", name)


def digest(value: Any) -> str:
    """Ten hexadecimal digits that identify a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def float_cell(scale: int) -> Cell:
    """The unquantized model."""
    return Cell(FLOAT, scale=scale)


def bicubic_cell(scale: int) -> Cell:
    """Bicubic upscaling of the low-resolution image."""
    return Cell(BICUBIC, scale=scale)


def with_changes(settings: T, changes: Mapping[str, Any]) -> T:
    """A dataclass with fields replaced by dotted name: ``rates.bounds`` is field `bounds` of field `rates`.

    Changes below a field that is itself set to None are ignored.

    Raises:
        ConfigError: There is no such field, or it is None and has no fields of its own.
    """
    known = {f.name for f in fields(cast(Any, settings))}
    changed: dict[str, Any] = {}
    for name, value in sorted(changes.items()):  # a field before what is below it
        head, _, inner = name.partition(".")
        if head not in known:
            raise ConfigError(
                f"{type(settings).__name__} has no such setting", found=head, expected=", ".join(sorted(known))
            )
        present = changed.get(head, getattr(settings, head))
        if not inner:
            changed[head] = value
        elif is_dataclass(present):
            changed[head] = with_changes(cast(Any, present), {inner: value})
        elif head not in changed:
            raise ConfigError(f"{head} is {present!r} and has no settings of its own", found=name)
    result: T = replace(cast(Any, settings), **changed)
    return result
