"""Mutations of a saved model's two files; where they are resealed, the check sums are right and the content is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from harmoq_ao.conversion.format import canonical_json, seal
from tests.fuzz.checkpoints import CHECKPOINTS
from tests.fuzz.registry import Registry, cut, flipped, odd_value


@dataclass(frozen=True)
class Folder:
    """A saved model as it was written."""

    config: bytes
    weights: bytes

    def with_config(self, change: Callable[[dict[str, Any]], Any]) -> Folder:
        """Another config with a right check sum."""
        config = json.loads(self.config)
        config.pop("sha256")
        changed = change(config)
        return Folder(canonical_json(seal(config if changed is None else changed)), self.weights)

    def with_weights(self, data: bytes) -> Folder:
        """Other weights that the config vouches for."""
        digest = hashlib.sha256(data).hexdigest()
        return Folder(self.config, data).with_config(lambda config: config["weights"].update(sha256=digest))

    def with_tensors(self, change: Callable[[dict[str, Tensor]], Any]) -> Folder:
        """Other tensors that the config vouches for."""
        tensors = load(self.weights)
        change(tensors)
        return self.with_weights(save(tensors))


SAVED_MODELS: Registry[Callable[[Folder], Folder]] = Registry()


@SAVED_MODELS.add
def intact(rng: Random) -> Callable[[Folder], Folder]:
    return lambda folder: folder


@SAVED_MODELS.add
def broken_bytes(rng: Random) -> Callable[[Folder], Folder]:
    damage = rng.choice((cut, flipped))
    if rng.random() < 0.5:
        return lambda folder: Folder(damage(folder.config, rng), folder.weights)
    return lambda folder: Folder(folder.config, damage(folder.weights, rng))


@SAVED_MODELS.add
def no_json(rng: Random) -> Callable[[Folder], Folder]:
    texts = (
        b"",
        b"{",
        b"[" * 100_000,
        b"null",
        b"[]",
        b'{"format":' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"format":NaN}',
    )
    text = rng.choice(texts)
    return lambda folder: Folder(text, folder.weights)


@SAVED_MODELS.add
def wrong_version(rng: Random) -> Callable[[Folder], Folder]:
    version = rng.choice((0, 1, 2, 4, 99, -1, "3", None, [3], 3.5, 10**30))
    return lambda folder: folder.with_config(lambda config: config.update(schema_version=version))


@SAVED_MODELS.add
def missing_field(rng: Random) -> Callable[[Folder], Folder]:
    return lambda folder: folder.with_config(lambda config: config.pop(rng.choice(sorted(config))) and None)


def _json_value(rng: Random) -> Any:
    """An odd value that JSON's writer takes."""
    while True:
        value = odd_value(rng)
        try:
            json.dumps(value).encode()
        except (ValueError, RecursionError):
            continue
        return value


@SAVED_MODELS.add
def odd_field(rng: Random) -> Callable[[Folder], Folder]:
    value = _json_value(rng)
    return lambda folder: folder.with_config(lambda config: config.update({rng.choice(sorted(config)): value}))


@SAVED_MODELS.add
def odd_field_within(rng: Random) -> Callable[[Folder], Folder]:
    part, value = rng.choice(("quantization_config", "traits", "weights", "sqnr_db")), _json_value(rng)

    def change(config: dict[str, Any]) -> None:
        config[part][rng.choice(sorted(config[part]))] = value

    return lambda folder: folder.with_config(change)


@SAVED_MODELS.add
def odd_shapes(rng: Random) -> Callable[[Folder], Folder]:
    shape = [rng.choice((0, 1, 3, 8, 10**6, 10**12, -1)) for _ in range(rng.randint(3, 5))]
    return lambda folder: folder.with_config(lambda config: config.update(example_shapes=[shape]))


@SAVED_MODELS.add
def other_layout(rng: Random) -> Callable[[Folder], Folder]:
    letters = "".join(rng.choice("hbf-x") for _ in range(rng.randrange(12)))
    return lambda folder: folder.with_config(lambda config: config["weights"].update(layout=letters))


@SAVED_MODELS.add
def weights_elsewhere(rng: Random) -> Callable[[Folder], Folder]:
    name = rng.choice(
        ("../model-000000000000.safetensors", "/etc/passwd", "", "a\0b", "model-0.safetensors", "config.json")
    )
    return lambda folder: folder.with_config(lambda config: config["weights"].update(file=name))


@SAVED_MODELS.add
def missing_or_surplus_tensor(rng: Random) -> Callable[[Folder], Folder]:
    def change(tensors: dict[str, Tensor]) -> None:
        if rng.random() < 0.5:
            tensors.pop(rng.choice(sorted(tensors)))
        else:
            tensors[rng.choice(("surplus", "one.weight", "floats.float64"))] = torch.zeros(3)

    return lambda folder: folder.with_tensors(change)


@SAVED_MODELS.add
def other_shape_or_type(rng: Random) -> Callable[[Folder], Folder]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = rng.choice(sorted(tensors))
        other = (lambda t: t.flatten()[:-1], lambda t: t[None], lambda t: t.double(), lambda t: t.to(torch.int64))
        tensors[name] = rng.choice(other)(tensors[name]).clone()

    return lambda folder: folder.with_tensors(change)


@SAVED_MODELS.add
def other_values(rng: Random) -> Callable[[Folder], Folder]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[rng.choice(sorted(tensors))]
        if tensor.is_floating_point():
            tensor.fill_(rng.choice((float("nan"), float("inf"), -1.0, 0.0, 6e4)))
        else:
            tensor.fill_(rng.choice((0, 127, 255)))

    return lambda folder: folder.with_tensors(change)


@SAVED_MODELS.add
def weights_of_any_file(rng: Random) -> Callable[[Folder], Folder]:
    make = CHECKPOINTS.mutations[rng.choice(sorted(CHECKPOINTS.mutations))]
    return lambda folder: folder.with_weights(make(rng).data)
