"""The check sum of what a preparation depends on: it changes with source, classes and attributes, not with weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harmoq_ao.preparation import fingerprint as module
from harmoq_ao.preparation.fingerprint import fingerprint
from harmoq_ao.zoo import architecture_spec, build_architecture
from tests.models import BY_NAME, build


class Plain(nn.Module):
    """A module with an attribute."""

    def __init__(self, value: Any = 1) -> None:
        super().__init__()
        self.value = value
        self.proj = nn.Linear(3, 3)


def test_weights_buffers_and_modes_do_not_matter() -> None:
    first, second = Plain(), Plain().train()
    with torch.no_grad():
        second.proj.weight.zero_()
    assert fingerprint(first.eval()) == fingerprint(second) == fingerprint(copy.deepcopy(first))


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (1, 1.0), (True, 1), ("a", "b"), ((1, 2), [1, 2]), ([1, [2]], [1, [3]]), ({"a": 1}, {"a": 2}), (None, 0)],
)
def test_plain_attributes_matter(one: Any, other: Any) -> None:
    assert fingerprint(Plain(one)) != fingerprint(Plain(other))


@pytest.mark.parametrize(
    ("one", "other"), [(np.int64(3), 3), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (torch.zeros(2), torch.ones(2))]
)
def test_what_is_equal_to_the_constructor_is_equal(one: Any, other: Any) -> None:
    assert fingerprint(Plain(one)) == fingerprint(Plain(other))


def test_names_and_classes_of_modules_matter() -> None:
    models = [nn.Sequential(Plain(), nn.ReLU()), nn.Sequential(Plain(), nn.GELU()), nn.Sequential(nn.ReLU(), Plain())]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_source_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(Plain())
    edited = tmp_path / "edited.py"
    edited.write_text(Path(__file__).read_text() + "\n# one line more")
    digest = module._file_digest
    monkeypatch.setattr(module, "_file_digest", lambda file: digest(str(edited) if file == __file__ else file))
    assert fingerprint(Plain()) != before


def test_a_class_without_a_file_has_none() -> None:
    namespace: dict[str, Any] = {"__name__": "typed_at_a_prompt", "nn": nn}
    exec("class Typed(nn.Module):\n    pass", namespace)
    assert fingerprint(namespace["Typed"]()) is None


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_architecture_is_the_one_that_its_description_builds(name: str) -> None:
    model = build(name)
    spec = json.loads(json.dumps(architecture_spec(model), sort_keys=True))
    assert fingerprint(build_architecture(spec, random=False)) == fingerprint(model)
