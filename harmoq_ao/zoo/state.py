"""The weights within what a trainer saved: which of several, without wrappers, prefixes and what is beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Weights = Literal["auto", "ema", "model"]
"""Which weights of a checkpoint are taken: the averaged ones if there are any, those, or the trained ones."""
WEIGHTS: tuple[str, ...] = get_args(Weights)

_MODEL = (
    *("params", "state_dict", "model_state_dict", "model_state", "model", "net", "net_g", "netG", "net_G", "network"),
    *("generator", "gen", "g", "G", "module", "online_model", "weights", "student", "base_model", "params_g"),
)
_EMA = (
    *("params_ema", "params-ema", "state_dict_ema", "model_state_dict_ema", "ema_state_dict", "model_ema", "ema_model"),
    *("ema", "net_g_ema", "netG_ema", "net_G_ema", "generator_ema", "g_ema", "G_ema", "ema_params"),
)
_WITHIN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # wherever a module was wrapped
_COUNTERS = frozenset(
    {"n_averaged", "num_updates", "decay", "initted", "step", "total_ops", "total_params", "ema_decay", "global_step"}
)
_DEEPEST = 5
_DRCT_MASK = "layers.0.swin2.attn_mask"
_WINDOWS = 16  # of the training image: any number above one; it decides the size of the mask that is made beforehand
_NORM = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


@dataclass(frozen=True)
class Candidate:
    """Weights that a checkpoint may mean.

    Args:
        path: Keys and prefixes on the way to them.
        state: Tensors by their names in the network.
        left_out: Entries beside them that are not of the network.
    """

    path: tuple[str, ...]
    state: dict[str, Tensor]
    left_out: tuple[str, ...] = field(default=())

    @property
    def is_ema(self) -> bool:
        """Whether they are an average over the training."""
        return any(part in _EMA for part in self.path)

    @property
    def label(self) -> str:
        """Where they were found."""
        return ".".join(self.path) or "the top of the file"


def candidates(loaded: Mapping[str, Any]) -> list[Candidate]:
    """All weights that may be meant, those with the shortest path first; the names are not looked at any further."""
    found = list(_candidates(loaded, ()))
    return sorted(found, key=lambda c: len(c.path))


def _candidates(entries: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Candidate]:
    """The tensors at a level with their names as they are, and what lies below a wrapper's key or prefix."""
    tensors = {_unwrapped(name): value for name, value in entries.items() if isinstance(value, Tensor)}
    own = {name: t for name, t in tensors.items() if name.rpartition(".")[2] not in _COUNTERS}
    if own:
        others = [name for name in entries if _unwrapped(name) not in own and not isinstance(entries[name], Mapping)]
        yield Candidate(path, _without_weight_norm(own), tuple(others))
    if len(path) == _DEEPEST:
        return
    prefixed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if rest and first in (*_MODEL, *_EMA):
            prefixed.setdefault(first, {})[rest] = tensor
    for first, inner in prefixed.items():
        beside = tuple(dict.fromkeys(f"{n.partition('.')[0]}.*" for n in tensors if n.partition(".")[0] != first))
        for candidate in _candidates(inner, (*path, first)):
            yield Candidate(candidate.path, candidate.state, (*beside, *candidate.left_out))
    for name, value in entries.items():
        if isinstance(value, Mapping) and name in (*_MODEL, *_EMA) and all(isinstance(key, str) for key in value):
            yield from _candidates(value, (*path, name))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WITHIN)


def wrapper_parts(loaded: Mapping[str, Any]) -> list[str]:
    """Wrappers of modules in the names (``torch.compile``, FSDP)."""
    names = [name for name, _ in _all_names(loaded, 0)]
    return [part for part in _WITHIN if any(part in name.split(".") for name in names)]


def _all_names(entries: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _all_names(value, depth + 1)
        elif isinstance(name, str):
            yield name, value


def _without_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that are stored as length and direction (weight normalisation), multiplied out."""
    for length, direction in _NORM:
        for name in [n for n in state if n.endswith(f".{length}")]:
            base = name.removesuffix(length)
            pair = state.get(f"{base}{direction}")
            g = state[name]
            if pair is None or g.dim() != pair.dim():
                continue
            others = [d for d in range(g.dim()) if g.shape[d] == 1]
            state = {n: t for n, t in state.items() if n not in (name, f"{base}{direction}")}
            state[f"{base}weight"] = (pair * (g / torch.linalg.vector_norm(pair.float(), dim=others, keepdim=True))).to(
                pair.dtype
            )
    return state


# --- index tables that a trainer left out -----------------------------------------------------------------------------


def with_index_tables(state: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], frozenset[str]]]:
    """The weights, and the same with empty index tables of the sizes that bias tables tell, where some are missing.

    spandrel infers windows from them. Their values come from the constructor.

    Yields:
        Tensors by name, and the names of those that are empty.
    """
    yield state, frozenset()
    tables = {n.removesuffix("bias_table"): t for n, t in state.items() if n.endswith("relative_position_bias_table")}
    square = {name: math.isqrt(t.shape[0]) for name, t in tables.items() if t.dim() == 2}
    windows = {name: (side + 1) // 2 for name, side in square.items() if "overlap_attn." not in name}
    if not windows:
        return
    window = next(iter(windows.values()))
    rooted = {"relative_position_index_SA": torch.zeros(window**2, window**2, dtype=torch.long)}
    overlaps = [side - window + 1 for name, side in square.items() if "overlap_attn." in name]
    if overlaps:
        rooted["relative_position_index_OCA"] = torch.zeros(window**2, overlaps[0] ** 2, dtype=torch.long)
    own = {f"{name}index": torch.zeros(w**2, w**2, dtype=torch.long) for name, w in windows.items()}
    if _DRCT_MASK.replace("attn_mask", "attn.relative_position_bias_table") in state:
        own[_DRCT_MASK] = torch.zeros(
            _WINDOWS, window**2, window**2
        )  # without it spandrel takes windows as not shifted
    for empty in (rooted, own):
        missing = {name: t for name, t in empty.items() if name not in state}
        if missing:
            yield {**state, **missing}, frozenset(missing)
