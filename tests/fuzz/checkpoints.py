"""Checkpoint files, damaged or forged. The bombs among them set an environment variable when they go off."""

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
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import Tensor

from tests.fuzz.damage import FileCase, any_of, damaged, noise

MARK = "HARMOQ_FUZZ_EXECUTED"
"""Environment variable that a payload sets."""
State = dict[str, Any]


@cache
def _model() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SRVGGNetCompact(num_feat=4, num_conv=1, upscale=2).state_dict()


def state() -> State:
    """A small model's state dict, to change."""
    return {name: tensor.clone() for name, tensor in _model().items()}


def saved(content: Any, legacy: bool = False) -> FileCase:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return FileCase(buffer.getvalue(), ".pth")


@cache
def _intact(kind: str) -> FileCase:
    if kind == "safetensors":
        return FileCase(safetensors.torch.save(state()), ".safetensors")
    return saved({"params": state()} if kind == "wrapped" else state(), legacy=kind == "legacy")


class Bomb:
    """Something whose unpickling calls a function."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


_CODE = f"import os; os.environ[{MARK!r}] = '1'"
BOMBS = any_of(Bomb(builtins.exec, _CODE), Bomb(builtins.eval, f"exec({_CODE!r})"), Bomb(os.putenv, MARK, "1"))
"""Several ways to run code."""


def _in_an_archive(bomb: Bomb) -> FileCase:
    source, buffer = zipfile.ZipFile(io.BytesIO(_intact("wrapped").data)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            bad = name.endswith("data.pkl")
            target.writestr(name, pickle.dumps(bomb, protocol=2) if bad else source.read(name))
    return FileCase(buffer.getvalue(), ".pth")


def _safetensors(header: Any, body: bytes = b"") -> FileCase:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return FileCase(struct.pack("<Q", len(text)) + text + body, ".safetensors")


def _forged_entry(dtype: Any, shape: Any, offsets: Any) -> FileCase:
    return _safetensors({"body.0.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(12))


def _ones(shapes: dict[str, list[int]]) -> FileCase:
    return FileCase(safetensors.torch.save({n: torch.ones(s) for n, s in shapes.items()}), ".safetensors")


def _without(names: set[str]) -> FileCase:
    return saved({name: tensor for name, tensor in state().items() if name not in names})


def _with(name: str, change: Callable[[Tensor], Tensor]) -> FileCase:
    weights = state()
    weights[name] = change(weights[name])
    return saved(weights)


def _renumbered(name: str, digits: int) -> FileCase:
    weights = state()
    weights[f"body.{10**digits}.weight"] = weights.pop(name)
    return saved(weights)


def _starting_with(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def _of_type(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


def _zeros(shape: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda _: torch.zeros(shape)


def _lying_strides(digits: int) -> Callable[[Tensor], Tensor]:
    return lambda _: torch.zeros(1).expand(10**digits, 1, 3, 3)


INTACT = any_of("safetensors", "wrapped", "legacy", "bare").map(_intact)
BOMB_BESIDE_WEIGHTS = st.builds(lambda bomb, legacy: saved({**state(), "extra": bomb}, legacy), BOMBS, st.booleans())
_NAMES = any_of(*sorted(_model()))
_FOREIGN = tuple(f"layer{index}.{part}" for index in range(5) for part in "ab")
_SIDES = st.lists(st.integers(1, 8), min_size=1, max_size=4)
_CONTENTS: tuple[Any, ...] = (None, 7, [], {}, {"params": {}}, {1: torch.zeros(1)}, {"a": "b"}, torch.zeros(3), "text")
_JUNK: tuple[Any, ...] = (None, "x", [torch.zeros(1)], {"a": {}}, 3.0, torch.zeros(2, 2).to_sparse(), set())
_TYPES = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16, torch.uint8)
_HEADERS = (b"{", b"{}", b"{" * 5000, b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}", b'{"__metadata__":[]}', b"{\xff}")

CHECKPOINTS: st.SearchStrategy[FileCase] = st.one_of(
    damaged(INTACT, header=300, most=8),
    st.builds(FileCase, any_of(0, 1, 8, 9, 200).flatmap(lambda n: noise(n, n)), any_of(".pth", ".safetensors", "")),
    st.builds(lambda file, suffix: FileCase(file.data, suffix), INTACT, any_of(".png", ".bin", "", ".ckpt")),
    BOMB_BESIDE_WEIGHTS,
    st.builds(
        lambda bomb, protocol, suffix: FileCase(pickle.dumps(bomb, protocol), suffix),
        BOMBS,
        st.integers(0, 5),
        any_of(".pth", ".pkl", ".safetensors"),
    ),
    BOMBS.map(_in_an_archive),
    # Tensors that belong to no model, or do not make up one.
    st.dictionaries(any_of(*_FOREIGN), st.lists(st.integers(1, 4), min_size=1, max_size=1), min_size=1).map(_ones),
    st.sets(_NAMES, min_size=1).map(_without),
    st.builds(_with, _NAMES, st.lists(any_of(0, 1, 2, 5), max_size=5).map(_zeros)),
    st.builds(_with, _NAMES, any_of(*_TYPES).map(_of_type)),
    st.builds(_with, _NAMES, any_of(float("nan"), float("inf"), -float("inf")).map(_starting_with)),
    st.builds(_with, _NAMES, st.integers(3, 9).map(_lying_strides)),
    st.builds(_renumbered, _NAMES, st.integers(2, 30)),
    st.builds(lambda content: saved(content), any_of(*_CONTENTS)),
    st.builds(lambda junk: saved({**state(), "junk": junk}), any_of(*_JUNK)),
    st.fixed_dictionaries(
        dict.fromkeys(
            ("lora_A.weight", "model.embed_tokens.weight", "conv_first.weight", "layers.0.attn.qkv.weight"), _SIDES
        )
    ).map(_ones),
    # Headers of safetensors.
    st.builds(
        _forged_entry,
        any_of("F32", "F64", "I4", "X", 3),
        any_of((10**9, 10**9), (-1,), (2**63,), (0,), (3,), "x", None),
        any_of([0, 12], [12, 0], [0, 10**12], [-4, 8], [0], None),
    ),
    st.builds(_safetensors, any_of(*_HEADERS), noise(8, 8)),
    st.builds(
        lambda length: FileCase(struct.pack("<Q", length) + b'{"a":{}}', ".safetensors"),
        any_of(0, 1, 2**20, 2**40, 2**63, 2**64 - 1),
    ),
)
