"""What was quantized, how, and what was not: one row per site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harmoq_ao.config import SiteSettings
from harmoq_ao.quant.quantizer import QuantizerSpec
from harmoq_ao.sites.prepared import PreparedSite
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.sites.site import FloatSite, Site


@dataclass(frozen=True)
class Lowering:
    """What computes a site.

    Args:
        kernel: Its kernel.
        reason: Why it is no fused one; None if it is.
    """

    kernel: str
    reason: str | None = None


@dataclass
class SiteRow:
    """One site of a report.

    Args:
        name: Site name.
        kind: ``linear``, ``matmul``, ``conv2d`` or ``module`` (a whole module left float).
        shape: Weight shape, or the contracted length of a product of activations (0: depends on the image).
        weight_bits: Bits of the weight or right operand; 32 is float.
        act_bits: Bits of the activation or left operand; 32 is float.
        bounds: Activation bounds ``(lo, hi)``, ``"dynamic"``, or None in float.
        joint_scale: Smallest and largest entry of the joint scale, or None.
        sqnr_db: Signal to quantization noise of the site's output on calibration samples, in dB.
        kernel: The code path that runs it, once converted.
        miss: Why that is no fused kernel, where there are such.
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
    reason: str | None = None
    sensitivity_db: float | None = None

    @property
    def depends_on_image(self) -> bool:
        """Whether the image reaches its operands; position-bias networks are constants."""
        return "does not depend on the image" not in (self.reason or "")

    @property
    def quantized(self) -> bool:
        """Whether at least one operand is quantized."""
        return self.reason is None


@dataclass
class Report:
    """Rows in execution order; contractions that are no sites come last.

    Args:
        title: What the report is about.
        rows: One per site.
    """

    title: str
    rows: list[SiteRow] = field(default_factory=list)

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"title": self.title, "macs_share": self.macs_share, "sites": [asdict(r) for r in self.rows]}

    def __str__(self) -> str:
        lines = [
            f"{self.title}: {len(self.quantized)} of {len(self.rows)} contractions quantized, "
            f"{100 * self.macs_share:.1f} % of multiply-accumulates"
        ]
        lines += [f"  {_describe(row)}" for row in self.rows]
        return "\n".join(lines)


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


def prepared_report(
    sites: Iterable[PreparedSite], settings: Callable[[Site], SiteSettings], floats: Iterable[FloatSite]
) -> Report:
    """Report of a prepared model; bounds and SQNR are there after calibration.

    Args:
        sites: Its sites in execution order.
        settings: Gives the quantizers of a site.
        floats: Contractions that stay float.
    """
    rows = []
    for module in sites:
        row = site_row(module.site, settings(module.site))
        if module.act_quantizer is not None and module.act_quantizer.has_bounds:
            lo, hi = module.act_quantizer.bounds()
            row.bounds = (float(lo.min()), float(hi.max()))
        if module.joint_scale is not None:
            row.joint_scale = (float(module.joint_scale.min()), float(module.joint_scale.max()))
        row.sqnr_db = module.site.sqnr_db
        rows.append(row)
    return Report("prepared model", rows + float_rows(floats))


def quantized_report(
    rows: Iterable[SiteRow], sites: Mapping[str, QuantizedSite], lowerings: Mapping[str, Lowering]
) -> Report:
    """Report of a converted model: rows of its preparation, with each site's kernel, bounds and joint scale.

    Args:
        rows: Of its preparation.
        sites: Its quantized sites by name.
        lowerings: What computes each of them.
    """
    found = []
    for row in rows:
        site = sites.get(row.name)
        facts: dict[str, Any] = {} if site is None else _stored_facts(site)
        if site is not None:
            facts |= {"kernel": lowerings[row.name].kernel, "miss": lowerings[row.name].reason}
        found.append(replace(row, **facts))
    return Report("quantized model", found)


def _stored_facts(site: QuantizedSite) -> dict[str, Any]:
    """What the tensors of a site tell, so that a loaded model reports what the saved one did."""
    facts: dict[str, Any] = {}
    bounds = getattr(site, "act_bounds", getattr(site, "left_bounds", None))
    if bounds is not None:
        step, second = (float(v) for v in bounds)
        lower = -second * step if site.site.kind == "conv2d" else second  # convolutions hold their zero point
        facts["bounds"] = (lower, lower + step * site.settings.act.qmax)
    scale = getattr(site, "joint_scale", None)
    if scale is not None:
        facts["joint_scale"] = (float(scale.min()), float(scale.max()))
    return facts


def float_rows(floats: Iterable[FloatSite]) -> list[SiteRow]:
    """Rows of contractions that stay as the author wrote them."""
    return [SiteRow(f.name, f.kind, macs=f.macs, reason=f.reason) for f in floats]


def _bits(spec: QuantizerSpec) -> int:
    return spec.bits if spec.enabled else 32
