"""What to quantize, to how many bits, and how; validated on construction."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from harmoq_ao.common.errors import ConfigError, shown
from harmoq_ao.quant.quantizer import Granularity, QuantizerSpec, Scheme, check_bits

Profile = Literal["deploy", "paper"]
Kind = Literal["linear", "matmul", "conv2d"]
Observer = Literal["minmax", "percentile", "mse", "histogram"]
JointScale = Literal["hso", "none"]
StorageDtype = Literal["auto", "float16", "bfloat16", "float32"]

_KIND_ALIASES = {"Linear": "linear", "Conv2d": "conv2d"}
_OFF = 16


@dataclass(frozen=True)
class SiteRule:
    """Settings for the sites a glob or a kind selects. Rules are ordered; the last one that matches a site wins.

    Args:
        sites: Glob over site names, such as ``"*.attn.qkv"`` or ``"layers.0.*::matmul_*"``.
        kind: ``linear``, ``matmul`` or ``conv2d``; None matches all.
        weight_bits: 2 to 8, or 16 / 32 for off; None leaves the setting as it is.
        act_bits: Likewise, for activations (both operands of a matmul).
        dynamic: Per-token ranges of each input (True), or calibrated ones (False); None leaves it.
        joint_scale: ``hso`` or ``none``; None leaves it.

    Raises:
        ConfigError: A value is outside its set.
    """

    sites: str = "*"
    kind: Kind | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    dynamic: bool | None = None
    joint_scale: JointScale | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sites, str) or not self.sites:
            raise ConfigError("A rule needs a glob of site names", found=shown(self.sites), expected="a text like '*'")
        object.__setattr__(
            self, "kind", _KIND_ALIASES.get(self.kind, self.kind) if isinstance(self.kind, str) else self.kind
        )
        _check_choice("kind", self.kind, (*get_args(Kind), None))
        _check_choice("joint_scale", self.joint_scale, (*get_args(JointScale), None))
        _check_choice("dynamic", self.dynamic, (True, False, None))
        for bits in (self.weight_bits, self.act_bits):
            if bits is not None:
                check_bits(bits)

    def matches(self, name: str, kind: str) -> bool:
        """Whether this rule selects the site of this name and kind."""
        return (self.kind is None or self.kind == kind) and fnmatch.fnmatchcase(name, self.sites)

    def describe(self) -> str:
        """The rule as a user would write it."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"SiteRule({', '.join(f'{k}={v!r}' for k, v in given.items())})"


@dataclass(frozen=True)
class SiteSettings:
    """Settings of one site after all rules.

    Args:
        weight: Quantizer of the weight (of the right operand, for a matmul).
        act: Quantizer of the activation (of the left operand, for a matmul).
        joint_scale: How the joint scale is chosen.
        joint_shift: Whether static inputs of linears with a joint scale are centred channel by channel.
        reason: Why the site stays in float, or None if it is quantized.
        relative_maps: Whether an attention map is quantized relative to the largest entry of each row.
        rms_ranges: Whether operands normalized over the image are quantized relative to their root mean square.
    """

    weight: QuantizerSpec
    act: QuantizerSpec
    joint_scale: JointScale
    joint_shift: bool = True
    reason: str | None = None
    relative_maps: bool = False
    rms_ranges: bool = False

    @property
    def both_quantized(self) -> bool:
        """Whether neither operand stays in float, so that the contraction runs on integers."""
        return self.act.enabled and self.weight.enabled


@dataclass(frozen=True)
class HarmoqConfig:
    """Configuration of a quantized model.

    Args:
        weight_bits: 2 to 8, or 16 / 32 to leave weights in float (W32A4).
        act_bits: 2 to 8, or 16 / 32 to leave activations in float (W4A32).
        profile: ``paper``: static per-tensor ranges on all activations, attention operands included, comparable with
            published tables. ``deploy``: the most accurate and fastest in our measurements: static per-tensor ranges on
            the inputs of linears, attention products in 16 or more bits. Per-token ranges (a rule with
            ``dynamic=True``) are better at 4 bits before refinement, not after it, and no fused kernel takes them.
        rules: Ordered :class:`SiteRule`; the last that matches a site wins.
        observer: How static quantization ranges are found: ``minmax``, ``percentile``, ``mse`` or ``histogram``. A
            histogram covers all channels together, so it excludes joint scales.
        joint_scale: ``hso`` (closed form, per channel) or ``none``.
        joint_shift: Whether static inputs of linears that have a joint scale are centred channel by channel as well.
        relative_maps: Whether static attention maps are quantized relative to the largest entry of each row, and
            normalised after the product with the values (`quant/relative_maps.py`). Without it, rows that attend to
            one token and rows that attend to all share one step.
        rms_ranges: Whether static ranges of operands that are normalized to length one over all pixels (queries and
            keys of attention among channels) are in units of their root mean square. Without it, their codes get
            coarser as the image gets larger.
        matmul_bits: Bits of both operands of attention products; None is the profile's choice.
        conv_bits: Bits of the weights and inputs of convolutions; 32 leaves them in float.
        storage_dtype: Stored type of parameters that stay in float: ``auto`` is float16, or bfloat16 for a tensor that
            overflows float16.
        seed: Seed of the observers' random samples, not negative.

    Raises:
        ConfigError: A value is outside its set.
    """

    weight_bits: int = 8
    act_bits: int = 8
    profile: Profile = "deploy"
    rules: Sequence[SiteRule] = ()
    observer: Observer = "mse"
    joint_scale: JointScale = "hso"
    joint_shift: bool = True
    relative_maps: bool = True
    rms_ranges: bool = True
    matmul_bits: int | None = None
    conv_bits: int = 32
    storage_dtype: StorageDtype = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for bits in (self.weight_bits, self.act_bits, self.conv_bits):
            check_bits(bits)
        if self.matmul_bits is not None:
            check_bits(self.matmul_bits)
        _check_choice("profile", self.profile, get_args(Profile))
        _check_choice("observer", self.observer, get_args(Observer))
        _check_choice("joint_scale", self.joint_scale, get_args(JointScale))
        _check_choice("joint_shift", self.joint_shift, (True, False))
        _check_choice("relative_maps", self.relative_maps, (True, False))
        _check_choice("rms_ranges", self.rms_ranges, (True, False))
        _check_choice("storage_dtype", self.storage_dtype, get_args(StorageDtype))
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ConfigError("seed must be a whole number", found=shown(self.seed), expected="0 to 2**63 - 1")
        object.__setattr__(self, "rules", _as_rules(self.rules))

    def settings(self, name: str, kind: str) -> SiteSettings:
        """Resolve profile and rules for one site.

        Args:
            name: Site name.
            kind: ``linear``, ``matmul`` or ``conv2d``.
        """
        weight_bits, act_bits, reason = self._defaults(kind)
        dynamic: bool | None = None
        joint = self.joint_scale
        for rule in self.rules:
            if not rule.matches(name, kind):
                continue
            if rule.weight_bits is not None or rule.act_bits is not None:
                weight_bits = weight_bits if rule.weight_bits is None else rule.weight_bits
                act_bits = act_bits if rule.act_bits is None else rule.act_bits
                reason = f"by rule: {rule.describe()}"
            dynamic = dynamic if rule.dynamic is None else rule.dynamic
            joint = joint if rule.joint_scale is None else rule.joint_scale
        joint = "none" if self.observer == "histogram" else joint
        weight, act = self._specs(kind, weight_bits, act_bits, dynamic)
        quantized = weight.enabled or act.enabled
        why_float = None if quantized else reason
        return SiteSettings(weight, act, joint, self.joint_shift, why_float, self.relative_maps, self.rms_ranges)

    def _defaults(self, kind: str) -> tuple[int, int, str]:
        if kind == "conv2d":
            return self.conv_bits, self.conv_bits, "convolutions stay in float unless conv_bits asks for them"
        if kind == "matmul":
            if self.matmul_bits is not None:
                return self.matmul_bits, self.matmul_bits, f"matmul_bits={self.matmul_bits}"
            if self.profile == "deploy":
                return _OFF, _OFF, "the deploy profile keeps attention products in 16 bits or more (see matmul_bits)"
            return self.act_bits, self.act_bits, f"act_bits={self.act_bits}"
        return self.weight_bits, self.act_bits, f"weight_bits={self.weight_bits}, act_bits={self.act_bits}"

    def _specs(
        self, kind: str, weight_bits: int, act_bits: int, dynamic: bool | None
    ) -> tuple[QuantizerSpec, QuantizerSpec]:
        dynamic = bool(dynamic)
        if kind == "conv2d":  # zero padding enters from outside the quantizer: zero needs a code of its own
            act = QuantizerSpec(act_bits, Scheme.INTEGER_ZERO_POINT)
            return QuantizerSpec(weight_bits, _weight_scheme(weight_bits), Granularity.PER_CHANNEL, axis=0), act
        granularity = Granularity.PER_TOKEN if dynamic else Granularity.PER_TENSOR
        act = QuantizerSpec(act_bits, Scheme.ASYMMETRIC, granularity, dynamic, axis=-1)
        if kind == "matmul":
            return QuantizerSpec(weight_bits, Scheme.ASYMMETRIC, granularity, dynamic, axis=-2), act
        return QuantizerSpec(weight_bits, _weight_scheme(weight_bits), Granularity.PER_CHANNEL, axis=0), act

    def check_rules(self, sites: Sequence[tuple[str, str]]) -> None:
        """Raise :class:`ConfigError` for the first rule that matches none of the sites, with near misses.

        Args:
            sites: All sites as (name, kind).
        """
        for rule in self.rules:
            if any(rule.matches(name, kind) for name, kind in sites):
                continue
            raise ConfigError(
                f"{rule.describe()} matches no site",
                found=f"{len(sites)} sites, none of which it selects",
                expected=f"a glob such as one of these names: {', '.join(_near_misses(rule, sites))}",
                remedy="correct the glob or the kind, or remove the rule",
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; only what differs from the default is written for rules."""
        data = asdict(self)
        data["rules"] = [{k: v for k, v in asdict(rule).items() if v is not None} for rule in self.rules]
        return data

    @classmethod
    def from_dict(cls, data: Any) -> HarmoqConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: Not a mapping, an unknown key, or a value outside its set.
        """
        if not isinstance(data, dict):
            raise ConfigError("A configuration is a mapping of settings", found=type(data).__name__)
        data = {"relative_maps": False, "rms_ranges": False} | _current(data)  # written before there were any
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(map(str, data)) - known)
        if unknown:
            close = difflib.get_close_matches(unknown[0], known, 3)
            raise ConfigError("Unknown setting", found=unknown[0][:120], expected=" or ".join(close) or sorted(known))
        return cls(**data)

    @property
    def widths(self) -> str:
        """`W8A8`, or `W2..8A8` where rules ask for other weight bits than the rest."""
        bits = {self.weight_bits, *(r.weight_bits for r in self.rules if r.weight_bits is not None)}
        weights = f"{min(bits)}..{max(bits)}" if len(bits) > 1 else f"{self.weight_bits}"
        return f"W{weights}A{self.act_bits}"


def _current(data: dict[str, Any]) -> dict[str, Any]:
    """A configuration as the present version writes it: joint scales by ``search`` are stored like those of ``hso``."""
    if isinstance(data.get("rules"), (list, tuple)):
        data = data | {"rules": [_current(rule) if isinstance(rule, dict) else rule for rule in data["rules"]]}
    return data | {"joint_scale": "hso"} if data.get("joint_scale") == "search" else data


def _as_rules(rules: Any) -> tuple[SiteRule, ...]:
    if not isinstance(rules, (list, tuple)):
        raise ConfigError("rules is a list of SiteRule", found=type(rules).__name__)
    return tuple(_as_rule(rule) for rule in rules)


def _as_rule(rule: Any) -> SiteRule:
    if isinstance(rule, SiteRule):
        return rule
    if isinstance(rule, dict):
        known = {f.name for f in fields(SiteRule)}
        unknown = sorted(set(map(str, rule)) - known)
        if unknown:
            raise ConfigError("Unknown setting in a rule", found=unknown[0][:120], expected=sorted(known))
        return SiteRule(**rule)
    raise ConfigError("A rule is a SiteRule or a mapping", found=shown(rule))


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
        close = difflib.get_close_matches(shown(value).strip("'"), [str(c) for c in choices], 1)
        hint = f"did you mean {close[0]!r}?" if close else None
        raise ConfigError(f"Unknown {name}", found=shown(value), expected=", ".join(map(repr, choices)), remedy=hint)


def _near_misses(rule: SiteRule, sites: Sequence[tuple[str, str]]) -> list[str]:
    names = [name for name, kind in sites if rule.kind in (None, kind)] or [name for name, _ in sites]
    plain = rule.sites.strip("*")
    close = difflib.get_close_matches(plain, names, 3, cutoff=0.3)
    return close or names[:3]


def _weight_scheme(bits: int) -> Scheme:
    """Mid-rise levels use the whole range at few bits; at 8 a level at zero costs nothing and fits int8 kernels."""
    return Scheme.INTEGER_ZERO_POINT if bits == 8 else Scheme.SYMMETRIC
