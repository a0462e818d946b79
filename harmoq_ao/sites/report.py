"""What was quantized, how, and what was not: one row per site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harmoq_ao.config import SiteSettings
from harmoq_ao.quant.quantizer import QuantizerSpec
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.sites.site import FloatCause, FloatReason, FloatSite, Site

_WORDS = {
    FloatCause.UNSUPPORTED: "have no integer form here",
    FloatCause.UNREACHED: "were reached by no example image",
    FloatCause.UNTRACED: "could not be traced",
}
"""Causes whose text says where; of all others the text is the same for many."""


@dataclass(frozen=True)
class Lowering:
    """What computes a site.

    Args:
        kernel: Its kernel.
        reason: Why it is not a fused one; None if it is.
    """

    kernel: str
    reason: str | None = None


@dataclass
class SiteRow:
    """One site of a report.

    Args:
        name: Site name.
        kind: ``linear``, ``matmul``, ``conv2d`` or ``conv`` (another convolution, which stays float).
        shape: Weight shape, or the contracted length of a product of activations (0: depends on the image).
        weight_bits: Bits of the weight or right operand; 32 is float.
        act_bits: Bits of the activation or left operand; 32 is float.
        bounds: Quantization range ``(lo, hi)`` of the activation, ``"dynamic"``, or None in float.
        joint_scale: Smallest and largest entry of the joint scale, or None.
        sqnr_db: Signal to quantization noise of the site's output on calibration samples, in dB.
        kernel: The code path that runs it, once converted.
        miss: Why that is not a fused kernel, where there is one.
        macs: Multiply-accumulates on the example image.
        reason: Why it stays in float.
        sensitivity_db: What quantizing this site alone costs the network's output, in dB, where that was measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    weight_bits: int = 32
    act_bits: int = 32
    bounds: tuple[float, float] | str | None = None
    joint_scale: tuple[float, float] | None = None
    sqnr_db: float | None = None
    kernel: str | None = None
    miss: str | None = None
    macs: int = 0
    reason: FloatReason | None = None
    sensitivity_db: float | None = None

    @property
    def depends_on_image(self) -> bool:
        """Whether the image reaches its operands; position-bias networks are constants."""
        return self.reason is None or self.reason.cause is not FloatCause.CONSTANT

    @property
    def quantized(self) -> bool:
        """Whether at least one operand is quantized."""
        return self.reason is None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the reason is its text."""
        return asdict(self) | {"reason": None if self.reason is None else self.reason.text}


@dataclass
class Report:
    """Rows in execution order; contractions that are not sites come last.

    Args:
        title: What the report is about.
        rows: One per site.
        notes: Sentences about all of them.
    """

    title: str
    rows: list[SiteRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[SiteRow]:
        """Linears and attention products that depend on the image, quantized or not."""
        return [r for r in self.rows if r.kind in ("linear", "matmul") and r.depends_on_image]

    @property
    def quantized(self) -> list[SiteRow]:
        """Rows with a quantized operand."""
        return [r for r in self.rows if r.quantized]

    @property
    def macs_share(self) -> float:
        """Share of all multiply-accumulates, convolutions included, that run on quantized operands."""
        total = sum(r.macs for r in self.rows)
        return sum(r.macs for r in self.quantized) / total if total else 0.0

    @property
    def left_float(self) -> dict[str, int]:
        """How many contractions that depend on the image stay float, convolutions included, by what keeps them so."""
        reasons = [r.reason for r in self.rows if r.reason is not None and r.depends_on_image]
        return dict(Counter(_WORDS.get(reason.cause, reason.text) for reason in reasons).most_common())

    def float_sentence(self) -> str:
        """:attr:`left_float` in words; empty where nothing stays float."""
        counts = self.left_float
        if not counts:
            return ""
        return f"{sum(counts.values())} contractions stay float: " + "; ".join(
            f"{n} {why}" for why, n in counts.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        sites = [r.to_dict() for r in self.rows]
        return {
            "title": self.title,
            "macs_share": self.macs_share,
            "left_float": self.left_float,
            "sites": sites,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        head = (
            f"{self.title}: {len(self.quantized)} of {len(self.rows)} contractions quantized, "
            f"{100 * self.macs_share:.1f} % of multiply-accumulates"
        )
        # All that is said of the whole is in the first line: after it comes one line per site.
        return "\n".join(
            [
                ". ".join(filter(None, [head, self.float_sentence(), *self.notes])),
                *(f"  {_describe(row)}" for row in self.rows),
            ]
        )


def _describe(row: SiteRow) -> str:
    if not row.quantized:
        return f"{row.name}  {row.kind}  float: {row.reason}"
    parts = [row.name, row.kind, str(tuple(row.shape)), f"W{row.weight_bits}A{row.act_bits}"]
    if isinstance(row.bounds, tuple):
        parts.append(f"[{row.bounds[0]:.4g}, {row.bounds[1]:.4g}]")
    elif row.bounds is not None:
        parts.append(row.bounds)
    if row.joint_scale is not None:
        parts.append(f"s {row.joint_scale[0]:.3g}..{row.joint_scale[1]:.3g}")
    if row.sqnr_db is not None:
        parts.append(f"{row.sqnr_db:.1f} dB")
    parts += [row.kernel] if row.kernel else []
    return "  ".join(parts + ([f"({row.miss})"] if row.miss else []))


def site_row(site: Site, settings: SiteSettings) -> SiteRow:
    """The part of a row that is known before calibration."""
    return SiteRow(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        weight_bits=_bits(settings.weight),
        act_bits=_bits(settings.act),
        bounds="dynamic" if settings.act.enabled and settings.act.dynamic else None,
        macs=site.macs,
        reason=site.reason,
    )


def quantized_report(
    rows: Iterable[SiteRow], sites: Mapping[str, QuantizedSite], lowerings: Mapping[str, Lowering]
) -> Report:
    """Report of a converted model: rows of its preparation, with each site's kernel, range and joint scale.

    Args:
        rows: Of its preparation.
        sites: Its quantized sites by name.
        lowerings: What computes each of them.
    """
    found = []
    for row in rows:
        facts: dict[str, Any] = {}
        if row.name in sites:
            lowering = lowerings[row.name]
            facts = sites[row.name].stored_facts() | {"kernel": lowering.kernel, "miss": lowering.reason}
        found.append(replace(row, **facts))
    return Report("quantized model", found)


def float_rows(floats: Iterable[FloatSite]) -> list[SiteRow]:
    """Rows of contractions that stay as the author wrote them."""
    return [SiteRow(f.name, f.kind, macs=f.macs, reason=f.reason) for f in floats]


def _bits(spec: QuantizerSpec) -> int:
    return spec.bits if spec.enabled else 32
