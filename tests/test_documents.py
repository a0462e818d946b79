"""What the documents name exists: files, modules, names of the public surface, links."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

import harmoq_ao

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Folders that a document may name a file relative to.
_BASES = (ROOT, ROOT / "harmoq_ao", ROOT / "triton_kernels", ROOT / "recipes", ROOT / "tests")
_MADE = {"demo_output/", "build/"}  # by a command that the sentence is about
_UPPERCASE = re.compile(r"[A-Z]{4,}")  # placeholders such as NAME


def _code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_folders_exist(page: Path) -> None:
    named = {c for c in _code(page) if re.fullmatch(r"[\w./]+(\.py|/)", c) and not _UPPERCASE.search(c)}
    assert not {c for c in named - _MADE if not _exists(c)}


def _exists(name: str) -> bool:
    if "/" not in name:  # beside a file that is named in full
        return any(next(base.rglob(name), None) for base in _BASES[1:])
    return any((base / name).exists() for base in _BASES)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_exist(page: Path) -> None:
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text()))
    assert not {(file, test) for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()}
    assert named or page.name != "field.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = {link for link in links if not link.startswith(("http:", "https:"))}
    assert not {link for link in local if not (page.parent / link).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_modules_that_exist(page: Path) -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", page.read_text()))
    modules -= {"pip", "pytest", "build", "ruff", "mypy"}
    assert not {m for m in modules if importlib.util.find_spec(m) is None}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "tutorial.ipynb"], ids=lambda p: p.name)
def test_what_is_imported_is_public(page: Path) -> None:
    text = page.read_text()
    if page.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"])
    for module, names in re.findall(r"^\s*from (harmoq_ao[\w.]*) import ([\w, ]+)", text, flags=re.MULTILINE):
        assert module == "harmoq_ao", f"{page.name} imports from {module}"
        assert {n.strip() for n in names.split(",")} <= set(harmoq_ao.__all__)
