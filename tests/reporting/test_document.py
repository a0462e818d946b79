"""The page without a browser: what is in it, and that nothing of others gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from harmoq_ao.common.errors import ConfigError, OutputError
from harmoq_ao.reporting import Scene, build_report, write_report
from harmoq_ao.reporting import document as document_module
from harmoq_ao.reporting.pictures import compare
from tests.reporting.conftest import HOSTILE, source


class Parsed(HTMLParser):
    """Tags, attributes, texts and first cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [value or "" for t, n, value in self.attributes if (t, n) == (tag, name)]


@pytest.fixture(scope="module")
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(text: str) -> Parsed:
    return Parsed(text)


def test_nothing_is_loaded_from_elsewhere(text: str, parsed: Parsed) -> None:
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert all(value.startswith("data:image/png;base64,") for value in parsed.values("img", "src"))
    assert all(value.startswith(("#", "data:")) for tag in ("a", "link") for value in parsed.values(tag, "href"))
    assert not parsed.values("script", "src")
    assert not [name for _, name, _ in parsed.attributes if name == "style" or name.startswith("on")]


def test_the_policy_names_its_own_script_and_style_alone(text: str, parsed: Parsed) -> None:
    policy = next(v for v in parsed.values("meta", "content") if "default-src" in v)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        content = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_names_are_text(text: str, parsed: Parsed) -> None:
    assert parsed.tags["script"] == 1
    assert not parsed.tags["b"]
    assert HOSTILE in parsed.texts
    assert HOSTILE in "".join(parsed.texts).partition("kernel or reason")[2]  # as a site, too
    assert "<script>alert" not in text
    assert "<b>bold" not in text
    assert any(HOSTILE in alt for alt in parsed.values("img", "alt"))


def test_every_site_has_its_row(parsed: Parsed, scene: Scene) -> None:
    rows = scene.model.report().rows
    assert len(rows) > 20
    assert Counter(parsed.values("th", "data-value")) == Counter(row.name for row in rows)
    row = next(row for row in rows if row.sqnr_db is not None)
    assert str(row.sqnr_db) in parsed.values("td", "data-value")


def test_the_summary_tells_what_was_done(text: str) -> None:
    for part in ("W4A4", "paper", "harmoq, preset fast", "SwinIR", "x2", "harmoq-ao 0", "torch 2", "smaller than"):
        assert part in text


def test_pictures_are_the_models_own(scene: Scene, parsed: Parsed) -> None:
    shown = compare(scene.sources[0], scene.quantized, scene.reference)
    first = [value.partition(",")[2] for value in parsed.values("img", "src")[:3]]
    after, before, heat = (Image.open(io.BytesIO(base64.b64decode(data))) for data in first)
    assert np.array_equal(np.asarray(after), shown.quantized)
    assert np.array_equal(np.asarray(before), shown.reference)
    assert not np.array_equal(shown.quantized, shown.reference)
    brightness = np.asarray(heat.convert("L"), np.float64)
    assert np.corrcoef(brightness.ravel(), shown.error.ravel())[0, 1] > 0.9
    assert f"{shown.scores['quantized'].psnr:.3f}" in "".join(parsed.texts)


def test_distributions_show_the_sites_of_the_lowest_sqnr(scene: Scene, text: str) -> None:
    measured = sorted(row.sqnr_db for row in scene.model.report().rows if row.sqnr_db is not None)
    part = text[text.index('id="distributions"') : text.index('id="harmonization"')]
    for value in measured[: scene.worst]:
        assert f"{value:.1f} dB" in part
    assert part.count('class="bound"') >= 2 * scene.worst
    assert "did not reach" not in part


def test_traces_are_drawn_where_they_were_kept(text: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("Training loss", "Held-out fidelity", "Convergence by site", "Balance by site", "after 10 steps"):
        assert label in text
    monkeypatch.setattr(scene.model, "history", None)
    without = build_report(replace(scene, sources=[source(high=False)], reference=None, worst=0, left_out=2))
    assert "carries no trace" in without
    assert "Training loss" not in without
    assert "No float model was given" in without
    assert "No originals were given" in without
    assert "2 more images were given" in without


def test_sensitivity_is_a_column_only_where_it_is_known(
    scene: Scene, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "sensitivity dB" not in text
    row = scene.model.rows[0]
    monkeypatch.setattr(row, "sensitivity_db", 0.12345)
    again = build_report(replace(scene, sources=[source()], worst=0))
    assert "sensitivity dB" in again
    assert 'data-value="0.12345">0.123<' in again


def test_an_error_leaves_the_former_page(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("former")
    monkeypatch.setattr(document_module, "build_report", lambda scene: "new \udcff")  # a name that is not UTF-8

    with monkeypatch.context() as full:
        full.setattr("os.replace", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OutputError, match="No space left"):
            write_report(scene, path)
    assert path.read_text() == "former"
    write_report(scene, path)
    assert path.read_text() == "new ?"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_scenes_that_make_no_report_are_refused(scene: Scene) -> None:
    assert scene.reference is not None
    with pytest.raises(ConfigError, match="about a quantized model"):
        replace(scene, quantized=scene.reference)
    with pytest.raises(ConfigError, match="needs a picture"):
        replace(scene, sources=[])
    with pytest.raises(ConfigError, match="Scales do not agree"):
        replace(scene, reference=replace(scene.reference, scale=3))
