"""Mutations of checkpoint files. The bombs among them set an environment variable when they go off."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import safetensors.torch
import torch
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import Tensor

from tests.fuzz.registry import FileCase, Registry, add_damage

CHECKPOINTS: Registry[FileCase] = Registry()
MARK = "HARMOQ_FUZZ_EXECUTED"
"""Environment variable that a payload sets."""


@cache
def _model() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SRVGGNetCompact(num_feat=4, num_conv=1, upscale=2).state_dict()


def state() -> dict[str, Any]:
    """A small model's state dict, to change."""
    return {name: tensor.clone() for name, tensor in _model().items()}


def saved(content: Any, *, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@cache
def _intact(kind: int) -> tuple[bytes, str]:
    if kind == 0:
        return safetensors.torch.save(state()), ".safetensors"
    return saved({"params": state()} if kind == 1 else state(), legacy=kind == 2), ".pth"


def _any(rng: Random) -> tuple[bytes, str]:
    return _intact(rng.randrange(3))


class Bomb:
    """Something whose unpickling calls a function."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def bomb(rng: Random) -> Bomb:
    """One of several ways to run code."""
    code = f"import os; os.environ[{MARK!r}] = '1'"
    return rng.choice((Bomb(builtins.exec, code), Bomb(builtins.eval, f"exec({code!r})"), Bomb(os.putenv, MARK, "1")))


def _safetensors(header: Any, body: bytes = b"") -> FileCase:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return FileCase(struct.pack("<Q", len(text)) + text + body, ".safetensors")


add_damage(CHECKPOINTS, _any, header=300, most=8)


@CHECKPOINTS.add
def empty_or_noise(rng: Random) -> FileCase:
    return FileCase(rng.randbytes(rng.choice((0, 1, 8, 9, 200))), rng.choice((".pth", ".safetensors", "")))


@CHECKPOINTS.add
def wrong_suffix(rng: Random) -> FileCase:
    return FileCase(_any(rng)[0], rng.choice((".png", ".bin", "", ".ckpt")))


@CHECKPOINTS.add
def bomb_beside_weights(rng: Random) -> FileCase:
    return FileCase(saved({**state(), "extra": bomb(rng)}, legacy=rng.random() < 0.5), ".pth")


@CHECKPOINTS.add
def bomb_alone(rng: Random) -> FileCase:
    return FileCase(pickle.dumps(bomb(rng), protocol=rng.randrange(6)), rng.choice((".pth", ".pkl", ".safetensors")))


@CHECKPOINTS.add
def bomb_in_an_archive(rng: Random) -> FileCase:
    source, buffer = zipfile.ZipFile(io.BytesIO(_intact(1)[0])), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            bad = name.endswith("data.pkl")
            target.writestr(name, pickle.dumps(bomb(rng), protocol=2) if bad else source.read(name))
    return FileCase(buffer.getvalue(), ".pth")


@CHECKPOINTS.add
def another_architecture(rng: Random) -> FileCase:
    weights = {f"layer{index}.{rng.choice('ab')}": torch.zeros(rng.randint(1, 4)) for index in range(5)}
    return FileCase(safetensors.torch.save(weights), ".safetensors")


@CHECKPOINTS.add
def missing_tensors(rng: Random) -> FileCase:
    weights = state()
    for name in rng.sample(sorted(weights), rng.randint(1, len(weights))):
        del weights[name]
    return FileCase(saved(weights), ".pth")


@CHECKPOINTS.add
def other_shapes(rng: Random) -> FileCase:
    weights = state()
    name = rng.choice(sorted(weights))
    shape = [rng.choice((0, 1, 2, 5)) for _ in range(rng.randint(0, 5))]
    weights[name] = torch.zeros(shape)
    return FileCase(saved(weights), ".pth")


@CHECKPOINTS.add
def other_types(rng: Random) -> FileCase:
    weights = state()
    dtype = rng.choice((torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16, torch.uint8))
    name = rng.choice(sorted(weights))
    weights[name] = weights[name].to(dtype)
    return FileCase(saved(weights), ".pth")


@CHECKPOINTS.add
def not_finite(rng: Random) -> FileCase:
    weights = state()
    weights[rng.choice(sorted(weights))].view(-1)[0] = rng.choice((float("nan"), float("inf"), -float("inf")))
    return FileCase(saved(weights), ".pth")


@CHECKPOINTS.add
def lying_strides(rng: Random) -> FileCase:
    weights = state()
    weights[rng.choice(sorted(weights))] = torch.zeros(1).expand(10 ** rng.randint(3, 9), 1, 3, 3)
    return FileCase(saved(weights), ".pth")


@CHECKPOINTS.add
def lying_layer_numbers(rng: Random) -> FileCase:
    weights = state()
    name = rng.choice(sorted(weights))
    weights[f"body.{10 ** rng.randint(2, 30)}.weight"] = weights.pop(name)
    return FileCase(saved(weights), ".pth")


@CHECKPOINTS.add
def no_state_dict(rng: Random) -> FileCase:
    contents: tuple[Any, ...] = (
        None,
        7,
        [],
        {},
        {"params": {}},
        {1: torch.zeros(1)},
        {"a": "b"},
        torch.zeros(3),
        "text",
    )
    return FileCase(saved(rng.choice(contents)), ".pth")


@CHECKPOINTS.add
def junk_in_the_state_dict(rng: Random) -> FileCase:
    junk: Any = rng.choice((None, "x", [torch.zeros(1)], {"a": {}}, 3.0, torch.zeros(2, 2).to_sparse(), set()))
    return FileCase(saved({**state(), "junk": junk}), ".pth")


@CHECKPOINTS.add
def lying_safetensors_header(rng: Random) -> FileCase:
    sizes = ((10**9, 10**9), (-1,), (2**63,), (0,), (3,), "x", None)
    entry = {
        "dtype": rng.choice(("F32", "F64", "I4", "X", 3)),
        "shape": rng.choice(sizes),
        "data_offsets": rng.choice(([0, 12], [12, 0], [0, 10**12], [-4, 8], [0], None)),
    }
    return _safetensors({"body.0.weight": entry}, bytes(12))


@CHECKPOINTS.add
def broken_safetensors_header(rng: Random) -> FileCase:
    headers = (b"{", b"{}", b"{" * 5000, b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}", b'{"__metadata__":[]}', b"{\xff}")
    return _safetensors(rng.choice(headers), rng.randbytes(8))


@CHECKPOINTS.add
def lying_header_length(rng: Random) -> FileCase:
    length = rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1))
    return FileCase(struct.pack("<Q", length) + b'{"a":{}}', ".safetensors")


@CHECKPOINTS.add
def foreign_safetensors(rng: Random) -> FileCase:
    names = ("lora_A.weight", "model.embed_tokens.weight", "conv_first.weight", "layers.0.attn.qkv.weight")
    shapes = [[rng.randint(1, 8) for _ in range(rng.randint(1, 4))] for _ in names]
    return FileCase(
        safetensors.torch.save({n: torch.ones(s) for n, s in zip(names, shapes, strict=True)}), ".safetensors"
    )
