"""The report page: the facts of a model, rendered into one self-contained HTML document."""

from __future__ import annotations

import base64
import hashlib
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.common.output import atomic_write
from harmoq_ao.common.progress import track
from harmoq_ao.common.version import __version__
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.reporting import charts
from harmoq_ao.reporting.distributions import Histogram, recorded, worst_sites
from harmoq_ao.reporting.pictures import Picture, Source, compare, heat_ceiling, heat_colours, heat_png, png
from harmoq_ao.reporting.sizes import float32_bytes, size_rows
from harmoq_ao.runtime.upscaler import Upscaler
from harmoq_ao.sites.history import History
from harmoq_ao.sites.report import Report, SiteRow

_TEMPLATES = "templates"
_PACKAGES = ("torch", "spandrel", "numpy")


@dataclass(frozen=True)
class Scene:
    """The subject of a report.

    Args:
        quantized: The quantized model.
        on_disk: Bytes of its folder.
        sources: Images to show; the first one also gives the distributions.
        reference: The float model, or None to compare with bicubic.
        left_out: Images that were given and are not shown.
        device: Whose kernels the table names: ``cpu`` or ``cuda``.
        worst: Most sites whose distributions are shown.
        tile: Side of the tiles in input pixels; None takes images whole.
        overlap: Pixels that adjacent tiles share.
    """

    quantized: Upscaler
    on_disk: int
    sources: Sequence[Source]
    reference: Upscaler | None = None
    left_out: int = 0
    device: str = "cpu"
    worst: int = 6
    tile: int | None = None
    overlap: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.quantized.model, QuantizedModel):
            raise ConfigError(
                "A report is about a quantized model",
                found=self.quantized.name,
                expected="a folder from harmoq quantize",
            )
        if not self.sources:
            raise ConfigError("A report needs a picture", found="none", expected="one image or more")
        if self.reference is not None and self.reference.scale != self.quantized.scale:
            raise ConfigError(
                "Scales do not agree",
                found=f"x{self.reference.scale} ({self.reference.name})",
                expected=f"x{self.quantized.scale}",
                remedy="pass the checkpoint that was quantized",
            )

    @property
    def model(self) -> QuantizedModel:
        """The quantized module."""
        assert isinstance(self.quantized.model, QuantizedModel)
        return self.quantized.model


def write_report(scene: Scene, path: str | Path) -> Path:
    """Write the report to a file; on any error a former file is left untouched.

    Args:
        scene: Model and pictures.
        path: Of the page.

    Raises:
        OutputError: The file cannot be written.
        InputError: See :func:`compare`.
    """
    text = build_report(scene)
    with atomic_write(path) as file:
        file.write(text.encode(errors="replace"))  # file names may hold bytes that are no text
    return Path(path)


def build_report(scene: Scene) -> str:
    """The report as one HTML page that loads nothing from elsewhere.

    Args:
        scene: Model and pictures.

    Raises:
        InputError: See :func:`compare`.
        ConfigError: See :func:`compare`.
    """
    report = scene.model.report(scene.device)
    worst = worst_sites(report.rows, scene.worst)
    pictures, histograms = _pictures(scene, [row.name for row in worst])
    context = {
        "name": Path(scene.quantized.name).name or scene.quantized.name,
        "summary": _summary(scene, report),
        "versions": {"harmoq-ao": __version__, "Python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
        "rows": report.rows,
        "with_sensitivity": any(row.sensitivity_db is not None for row in report.rows),
        "device": scene.device,
        **_picture_facts(scene, pictures),
        "distributions": [_distribution(row, histograms.get(row.name, [])) for row in worst],
        "history": _history_facts(scene.model.history),
        **_size_facts(scene),
    }
    return _rendered(context)


def _pictures(scene: Scene, names: Sequence[str]) -> tuple[list[Picture], dict[str, list[Histogram]]]:
    """Every picture, and histograms of the sites of these names on the first one."""
    pictures: list[Picture] = []
    histograms: dict[str, list[Histogram]] = {}
    for source in track(scene.sources, "Upscaling"):
        with recorded(scene.model, () if pictures else names) as found:
            pictures.append(compare(source, scene.quantized, scene.reference, scene.tile, scene.overlap))
        histograms |= found
    return pictures, histograms


def _rendered(context: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("harmoq_ao.reporting", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decibel": _decibel,
        "ssim": _ssim,
        "short": _short,
        "bar": charts.bar,
        "breakable": _breakable,
    }
    style, script = _inlined("report.css"), _inlined("report.js")
    hashes = {"style_hash": _csp_hash(style), "script_hash": _csp_hash(script)}
    return environment.get_template("report.html").render(context, style=style, script=script, **hashes)


def _inlined(name: str) -> Markup:
    """A template file verbatim: text inside style and script elements is not HTML."""
    return Markup((files("harmoq_ao.reporting") / _TEMPLATES / name).read_text(encoding="utf-8"))


def _csp_hash(text: str) -> str:
    """Hash by which the page's content security policy allows an element; no other would run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


# --- facts ------------------------------------------------------------------------------------------------------------


def _summary(scene: Scene, report: Report) -> dict[str, str]:
    model, config, history = scene.model, scene.model.config, scene.model.history
    spec = model.traits.architecture
    done = sum(row.quantized for row in report.sites)
    whole = float32_bytes(model)
    size = f"{scene.on_disk:,}" + (
        "" if whole is None else f" ({whole / scene.on_disk:.2f}x smaller than {whole:,} of float32)"
    )
    known = history is not None and history.method is not None
    return {
        "Architecture": "not of spandrel" if spec is None else str(spec.get("architecture", "unknown")),
        "Scale": f"x{scene.quantized.scale}",
        "Bits": config.widths,
        **({"Mixed precision": history.choice} if history and history.choice else {}),
        "Profile": config.profile,
        "Method": f"{history.method}, {'own settings' if history.preset is None else f'preset {history.preset}'}"
        if history and known
        else "not recorded",
        "Bytes": size,
        "Sites quantized": f"{done} of {len(report.sites)} (linears and attention products)",
        "In float": report.float_sentence() or "nothing",
        "Multiply-accumulates": f"{100 * report.macs_share:.1f} % on quantized operands",
        "Rest of the model": str(model.float_dtype).removeprefix("torch."),
    }


def _picture_facts(scene: Scene, pictures: Sequence[Picture]) -> dict[str, Any]:
    ceiling = heat_ceiling(pictures)
    shown = [
        {
            "facts": picture,
            "reference": png(picture.reference),
            "quantized": png(picture.quantized),
            "error": heat_png(picture.error, ceiling),
        }
        for picture in pictures
    ]
    colours = ["#{:02x}{:02x}{:02x}".format(*map(int, colour)) for colour in heat_colours(9)]
    methods = [m for m in ("float", "quantized", "bicubic") if any(m in p.scores for p in pictures)]
    means = {m: _means(pictures, m) for m in methods} if all(p.scores for p in pictures) else {}
    return {
        "pictures": shown,
        "against": "bicubic" if scene.reference is None else "float",
        "ceiling": ceiling,
        "colours": colours,
        "methods": methods,
        "means": means,
        "left_out": scene.left_out,
        "scale": scene.quantized.scale,
    }


def _means(pictures: Sequence[Picture], method: str) -> tuple[float, float]:
    scores = [picture.scores[method] for picture in pictures]
    return math.fsum(s.psnr for s in scores) / len(scores), math.fsum(s.ssim for s in scores) / len(scores)


def _distribution(row: SiteRow, histograms: Sequence[Histogram]) -> dict[str, Any]:
    drawn = [(h, charts.histogram_chart(h, f"Values of {h.operand} of {row.name}")) for h in histograms]
    return {"row": row, "charts": drawn}


def _history_facts(history: History | None) -> dict[str, Any]:
    drawn: dict[str, Markup] = {}
    if history is None:
        return {"known": False, "charts": drawn, "best_step": None}
    steps = "steps of refinement"
    if history.losses:
        log = "y" if all(value > 0 for _, value in history.losses) else ""
        drawn["Training loss"] = charts.xy_chart(history.losses, steps, "loss", title="Training loss", log=log)
    if history.held_out:
        fidelity, title = "PSNR to the float model, dB", "Fidelity on held-out crops"
        chart = charts.xy_chart(history.held_out, steps, fidelity, title=title, mark=history.best_step)
        drawn["Held-out fidelity"] = chart
    drawn |= _site_charts(history)
    return {"known": True, "charts": drawn, "best_step": history.best_step if history.held_out else None}


def _site_charts(history: History) -> dict[str, Markup]:
    """Reduction of each site's error by Algorithm 1, and how the error is shared between its operands."""
    drawn = {}
    moved = [(i, s) for i, s in enumerate(history.sites, start=1) if s.start > 0 and s.end > 0]
    if moved:
        points = [(float(i), 10 * math.log10(s.start / s.end)) for i, s in moved]
        names = [f"{s.name}: {gain:.2f} dB" for (_, s), (_, gain) in zip(moved, points, strict=True)]
        axes = "site, in execution order", "reduction of the output error, dB"
        title = "Reduction of the error at each site"
        drawn["Convergence by site"] = charts.xy_chart(points, *axes, title=title, names=names)
    shares = [(s.name, s.left, s.right) for s in history.sites if s.left and s.right and min(s.left, s.right) > 0]
    if shares:
        axes = "error by activation (left)", "error by weight (right)"
        names = [f"{name}: activation {left:.3g}, weight {right:.3g}" for name, left, right in shares]
        points = [(left, right) for _, left, right in shares]
        drawn["Balance by site"] = charts.xy_chart(
            points, *axes, title="Balance of the operands", log="xy", names=names, diagonal=True
        )
    return drawn


def _size_facts(scene: Scene) -> dict[str, Any]:
    rows = size_rows(scene.model, scene.on_disk)
    whole = float32_bytes(scene.model)
    widest = max([scene.on_disk, whole or 0])
    most = max(max(row.stored, row.float32 or 0) for row in rows)
    return {"sizes": rows, "on_disk": scene.on_disk, "float_bytes": whole, "widest": widest, "most": most}


def _decibel(value: float | None, digits: int = 2) -> str:
    return "" if value is None else "∞" if math.isinf(value) else f"{value:.{digits}f}"


def _ssim(value: float) -> str:
    return "too small" if math.isnan(value) else f"{value:.4f}"


def _breakable(name: str) -> Markup:
    """A dotted name that may be broken after its dots."""
    return Markup(".<wbr>").join(name.split("."))


def _short(value: float) -> str:
    return f"{value:.3g}"


__all__ = ["Scene", "build_report", "write_report"]
