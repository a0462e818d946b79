"""What a study measures: one method at one width, scale and profile, and everything else that decides its numbers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig, Profile, SiteRule
from harmoq_ao.harmonization.presets import PRESETS, HarmonizeSettings
from harmoq_ao.quant.quantizer import check_bits

FLOAT = "float"
BICUBIC = "bicubic"
HARMOQ = "harmoq"
REFERENCES = (BICUBIC, FLOAT)
"""Rows that quantize nothing."""
_HASHED = 10
_SECTIONS = ("config", "algorithm", "refine", "crops", "crop_size", "held_out")

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
        return with_changes(base, self.section("config"))

    def section(self, name: str) -> dict[str, Value]:
        """Options below a name, without it: ``config.seed`` of section ``config`` is ``seed``."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.options if key.startswith(prefix)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without what a reference does not have."""
        if self.is_reference:
            return {"method": self.method, "scale": self.scale}
        rules = [{k: v for k, v in vars(rule).items() if v is not None} for rule in self.rules]
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return plain | {"rules": rules, "options": dict(self.options)}

    def identity(self, surroundings: Mapping[str, Any]) -> str:
        """File name without suffix, unique to the cell and to what surrounds it (model, photographs, seed)."""
        key = {"cell": self.to_dict(), **surroundings}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:_HASHED]
        parts = (self.method, self.bits.lower(), f"x{self.scale}", "" if self.is_reference else self.profile)
        return re.sub(r"[^a-z0-9]+", "-", "-".join(part for part in (*parts, digest) if part))


def float_cell(scale: int) -> Cell:
    """The unquantized model."""
    return Cell(FLOAT, scale=scale)


def bicubic_cell(scale: int) -> Cell:
    """Bicubic upscaling of the low-resolution image."""
    return Cell(BICUBIC, scale=scale)


def with_changes(settings: T, changes: Mapping[str, Any]) -> T:
    """A dataclass with some fields changed by dotted name, ``rates.bounds`` being field `bounds` of field `rates`.

    A field that is set to None loses what is asked of its own fields.

    Raises:
        ConfigError: There is no such field, or it is None and has none of its own.
    """
    known = {f.name for f in fields(cast(Any, settings))}
    unknown = sorted({name.partition(".")[0] for name in changes} - known)
    if unknown:
        raise ConfigError(
            f"{type(settings).__name__} has no such setting", found=unknown[0], expected=", ".join(sorted(known))
        )
    direct = {name: value for name, value in changes.items() if "." not in name}
    for head in dict.fromkeys(name.partition(".")[0] for name in changes if "." in name):
        inner = {n.removeprefix(f"{head}."): v for n, v in changes.items() if n.startswith(f"{head}.")}
        present = direct.get(head, getattr(settings, head))
        if head in direct and present is None:
            continue
        if not is_dataclass(present):
            raise ConfigError(f"{head} is {present!r} and has no settings of its own", found=f"{head}.{min(inner)}")
        direct[head] = with_changes(cast(Any, present), inner)
    changed: T = replace(cast(Any, settings), **direct)
    return changed


def harmonize_settings(base: HarmonizeSettings, cell: Cell) -> HarmonizeSettings:
    """Settings of HarmoQ's stages (a preset) with the cell's options applied, except those of the configuration.

    A setting of Algorithm 1 turns it on where the preset leaves it out.

    Raises:
        ConfigError: An option names no setting, or a setting of a stage that the preset leaves out.
    """
    changes = {name: value for name, value in cell.options if not name.startswith("config.")}
    asked = any(name.startswith("algorithm.") for name in changes)
    if asked and base.algorithm is None:
        base = replace(base, algorithm=PRESETS["algorithm"].algorithm)
    return with_changes(base, changes)


def to_plain(value: Any) -> Any:
    """Settings, traces and numbers as JSON holds them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
