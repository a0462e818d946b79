"""A saved model's two files, changed; where they are resealed, the check sums are right and the content is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from harmoq_ao.conversion.format import canonical_json, seal
from tests.fuzz.checkpoints import CHECKPOINTS
from tests.fuzz.damage import ODD, any_of, cut, flipped


@dataclass(frozen=True)
class Folder:
    """A saved model as it was written."""

    config: bytes
    weights: bytes

    def fields(self) -> dict[str, Any]:
        """The config without its check sum."""
        config: dict[str, Any] = json.loads(self.config)
        config.pop("sha256")
        return config

    def reordered(self, names: list[str]) -> Folder:
        """The same config, its fields in another order."""
        config = json.loads(self.config)
        return Folder(json.dumps({name: config[name] for name in names}).encode(), self.weights)

    def with_config(self, config: dict[str, Any]) -> Folder:
        """Another config with a right check sum."""
        return Folder(canonical_json(seal(config)), self.weights)

    def with_field(self, value: Any, *path: str) -> Folder:
        """Another value in the config."""
        config = part = self.fields()
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        return self.with_config(config)

    def without_field(self, name: str) -> Folder:
        """A config that lacks a field."""
        return self.with_config({key: value for key, value in self.fields().items() if key != name})

    def with_weights(self, data: bytes) -> Folder:
        """Other weights that the config vouches for."""
        return Folder(self.config, data).with_field(hashlib.sha256(data).hexdigest(), "weights", "sha256")

    def with_tensors(self, changed: dict[str, Tensor | None]) -> Folder:
        """Other tensors (None: none) that the config vouches for."""
        tensors = {**load(self.weights), **changed}
        return self.with_weights(save({name: tensor for name, tensor in tensors.items() if tensor is not None}))


def _is_json(value: Any) -> bool:
    """Whether JSON's writer takes a value."""
    try:
        json.dumps(value).encode()
    except (ValueError, RecursionError):
        return False
    return True


_NO_JSON = (
    *b"{ null [] \xff\xfe".split(),
    b"",
    b"[" * 100_000,
    b'{"format":' + b"9" * 5000 + b"}",
    b'{"format":NaN}',
)
_ELSEWHERE = ("../model-000000000000.safetensors", "/etc/passwd", "", "a\0b", "model-0.safetensors", "config.json")
_PARTS = ("quantization_config", "traits", "weights", "found")
_RESHAPED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda tensor: tensor.flatten()[:-1].clone(),
    lambda tensor: tensor[None].clone(),
    lambda tensor: tensor.double(),
    lambda tensor: tensor.to(torch.int64),
)
_FLOATS, _CODES = (float("nan"), float("inf"), -1.0, 0.0, 6e4), (0, 127, 255)


def saved_models(folder: Folder) -> st.SearchStrategy[Folder]:
    """What may have become of a saved model."""
    config, tensors = folder.fields(), load(folder.weights)
    names, odd = any_of(*sorted(tensors)), ODD.filter(_is_json)
    within = [(part, name) for part in _PARTS for name in sorted(config[part])]
    filled = [
        {name: torch.full_like(tensor, value)}
        for name, tensor in tensors.items()
        for value in (_FLOATS if tensor.is_floating_point() else _CODES)
    ]
    return st.one_of(
        st.permutations(sorted(json.loads(folder.config))).map(folder.reordered),  # intact
        st.builds(Folder, cut(folder.config) | flipped(folder.config), st.just(folder.weights)),
        st.builds(Folder, st.just(folder.config), cut(folder.weights) | flipped(folder.weights)),
        st.builds(Folder, any_of(*_NO_JSON), st.just(folder.weights)),
        any_of(0, 1, 2, 3, 5, 99, -1, "4", None, [4], 4.5, 10**30).map(
            lambda v: folder.with_field(v, "schema_version")
        ),
        any_of(*sorted(config)).map(folder.without_field),
        st.builds(folder.with_field, odd, any_of(*sorted(config))),
        st.builds(lambda value, path: folder.with_field(value, *path), odd, any_of(*within)),
        st.lists(any_of(0, 1, 3, 8, 10**6, 10**12, -1), min_size=3, max_size=5).map(
            lambda shape: folder.with_field([shape], "example_shapes")
        ),
        st.text("hbf-x", max_size=11).map(lambda letters: folder.with_field(letters, "weights", "layout")),
        any_of(*_ELSEWHERE).map(lambda name: folder.with_field(name, "weights", "file")),
        names.map(lambda name: folder.with_tensors({name: None})),
        any_of("surplus", "one.weight", "floats.float64").map(lambda n: folder.with_tensors({n: torch.zeros(3)})),
        st.builds(lambda name, reshape: folder.with_tensors({name: reshape(tensors[name])}), names, any_of(*_RESHAPED)),
        any_of(*filled).map(folder.with_tensors),
        CHECKPOINTS.map(lambda file: folder.with_weights(file.data)),
    )
