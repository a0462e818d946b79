"""What preparing and finalizing a model found, as the entry ``found`` of a saved model's config; nothing is trusted.

* ``sites``: ``[*name, multiply-accumulates]`` in execution order; of a quantized one also its SQNR in dB, or null.
* ``floats``: ``[*name, multiply-accumulates, reason]``, by its number in ``reasons``: ``[kind of site, cause, text]``.
* ``islands``: ``[*name, plan]``, the plan by its number in ``plans``; of one that stays float also why.
* ``mlps`` and ``kept``: modules whose forward is replaced.

A name is two entries: how many letters it shares with the one before in its list, and the rest of it. Entries that
stood in the list before, since blocks are alike, are one of two numbers: how many entries before, and how many of them
(version 4 wrote them all). Otherwise they would take more room than 2-bit weights. A plan lists the contractions of all
islands of one class, each as
``[operation, number, function, line, occurrence, facts]``: its name among the island's sites, its place in the source
as in :class:`SourceKey`, and what its site is made from, or null where the call stays float.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from torch import nn

from harmoq_ao.common.errors import SavedModelError, shown
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.conversion.passes import Exchanged, exchanged_in
from harmoq_ao.graph import einsum_form, is_island
from harmoq_ao.graph.contractions import CONTRACTION_FUNCTIONS, SourceKey
from harmoq_ao.graph.exchange import original_class
from harmoq_ao.preparation.found import Found, FoundIsland, FoundSite, Spot
from harmoq_ao.preparation.restore import found_in
from harmoq_ao.sites.quantized import QuantizedLinear
from harmoq_ao.sites.site import FloatCause, FloatReason, FloatSite, Role

_MAX_ENTRIES = 1 << 16  # sites, modules and contractions that a saved model may claim to have
_MAX_VALUES = 1 << 26  # of all joint scales and computed weights together, which are made before tensors are read
_REACH = 256  # entries back in which repeated ones are looked for when writing
_MAX_TEXT = 4000
_MAX_NAME = 400
_MAX_MACS = 1 << 62
_MAX_DB = 1e4
_FIELDS = ("fingerprint", "torch", "sites", "floats", "reasons", "islands", "plans", "mlps", "kept")
_FACTS = ("shape", "role", "equation", "weight", "location", "unit_length")
_OPERATIONS = frozenset(CONTRACTION_FUNCTIONS.values())
_SHAPES = {"linear": 2, "sdpa": 2}
_DIGEST = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")
N = TypeVar("N", bound=FoundSite | FloatSite | FoundIsland)


@dataclass(frozen=True)
class Description:
    """Everything that loading needs beside tensors, configuration and architecture.

    Args:
        found: By the preparation.
        sqnr_db: Of each quantized site by name.
        exchanged: By finalizing.
    """

    found: Found
    sqnr_db: dict[str, float | None]
    exchanged: Exchanged

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        found = self.found
        plans: list[list[Any]] = []
        reasons: list[list[str]] = []
        plan = [_number_of([_spot(s) for s in i.spots], plans) for i in found.islands]
        why = [_number_of([f.kind, str(f.reason.cause), f.reason.text[:_MAX_TEXT]], reasons) for f in found.floats]
        return {
            "fingerprint": found.fingerprint,
            "torch": found.torch,
            "sites": _named(found.sites, lambda s, i: [s.macs, *self._ratio(s)]),
            "floats": _named(found.floats, lambda f, i: [f.macs, why[i]]),
            "reasons": reasons,
            "islands": _named(found.islands, lambda s, i: [plan[i], *filter(None, [s.float_reason])]),
            "plans": plans,
            "mlps": [list(mlp) for mlp in self.exchanged.mlps],
            "kept": list(self.exchanged.kept),
        }

    def _ratio(self, site: FoundSite) -> list[float | None]:
        return [self.sqnr_db[site.name]] if site.name in self.sqnr_db else []

    @classmethod
    def from_dict(cls, data: Any) -> Description:
        """Inverse of :meth:`to_dict`; the data is not trusted.

        Raises:
            SavedModelError: An entry is missing, unknown, too large or of the wrong form.
        """
        try:
            if set(data) != set(_FIELDS):
                raise ValueError("entries of another version")
            return _description(data)
        except SavedModelError:
            raise
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise SavedModelError(
                "What a saved model says of its sites is not valid",
                found=shown(f"{type(error).__name__}: {str(error)[:200]}"),
                remedy="copy the folder again, or quantize the float model anew",
            ) from error


def description_of(model: QuantizedModel) -> Description:
    """The description of a converted model."""
    ratios = {r.name: None if r.sqnr_db is None else round(r.sqnr_db, 2) for r in model.rows if r.quantized}
    return Description(found_in(model.model, model.rows, model.fingerprint), ratios, exchanged_in(model.model))


def check_exchanged(model: nn.Module, exchanged: Exchanged) -> None:
    """Whether a model has the modules whose forward is to be replaced, and they are of the kind.

    Args:
        model: The author's model with quantized sites.
        exchanged: What a file says.

    Raises:
        SavedModelError: It has not.
    """
    modules = dict(model.named_modules())
    linears = {name for name, *parts in exchanged.mlps for part in parts[:2] if not _is_linear(modules, name, part)}
    odd = [
        n for n in exchanged.kept if n not in modules or original_class(modules[n]) not in (nn.Linear, nn.Sequential)
    ]
    for name in (*sorted(linears), *odd):
        raise SavedModelError(
            "A module whose forward is to be replaced is not of the kind",
            found=shown(name),
            remedy="copy the folder again, or quantize the float model anew",
        )


def _is_linear(modules: dict[str, nn.Module], name: str, part: str) -> bool:
    """Whether a part of a module is a linear on integers."""
    module = modules.get(name)
    linear = None if module is None or is_island(module) else module._modules.get(part)
    return isinstance(linear, QuantizedLinear) and linear.both_quantized


def _named(entries: Sequence[N], more: Callable[[N, int], list[Any]]) -> list[list[Any]]:
    """Entries with names, each as the letters that its name shares with the one before, the rest of it, and more."""
    before = ""
    rows: list[list[Any]] = []
    for index, entry in enumerate(entries):
        name = entry.name
        shared = 0
        while name[: shared + 1] == before[: shared + 1] and shared < len(name):
            shared += 1
        rows.append([shared, name[shared:], *more(entry, index)])
        before = name
    return _shortened(rows)


def _shortened(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows of three and more members, those that repeat earlier ones as ``[how many rows before, how many]``."""
    short: list[list[Any]] = []
    index = 0
    while index < len(rows):
        runs = [(_alike(rows, index, back), -back) for back in range(1, min(index, _REACH) + 1)]
        length, back = max(runs, default=(0, 0))
        short.append([-back, length] if length > 1 else rows[index])
        index += max(length, 1)
    return short


def _alike(rows: list[list[Any]], index: int, back: int) -> int:
    """How many rows from an index on equal those so many rows before them."""
    end = index
    while end < len(rows) and rows[end] == rows[end - back]:
        end += 1
    return end - index


def _number_of(value: T, values: list[T]) -> int:
    """The number of a value among those that are kept once."""
    if value not in values:
        values.append(value)
    return values.index(value)


def _spot(spot: Spot) -> list[Any]:
    facts: dict[str, Any] = {}
    if spot.is_site:
        values = (list(spot.shape), spot.role, spot.equation, spot.weight, spot.location, spot.unit_length or None)
        facts = {name: value for name, value in zip(_FACTS, values, strict=True) if value is not None}
    key = spot.key
    return [spot.op, spot.index, key.function, key.line, key.occurrence, facts or None]


# --- reading ----------------------------------------------------------------------------------------------------------


def _description(data: dict[str, Any]) -> Description:
    reasons = [(_text(k), FloatReason(FloatCause(c), _text(text))) for k, c, text in _entries(data["reasons"])]
    plans = [tuple(map(_read_spot, _entries(plan))) for plan in _entries(data["plans"])]
    sites = [(name, _whole(macs, _MAX_MACS), _ratio(more)) for name, macs, *more in _with_names(data["sites"])]
    floats = [(n, *_number(reasons, why), _whole(macs, _MAX_MACS)) for n, macs, why in _with_names(data["floats"])]
    islands = [(name, _number(plans, p), *map(_text, why)) for name, p, *why in _with_names(data["islands"])]
    mlps = [(_text(n), _text(a), _text(b), _one_of(("erf", "tanh"), gelu)) for n, a, b, gelu in _entries(data["mlps"])]
    if len({name for name, *_ in sites}) != len(sites):
        raise ValueError("a site twice")
    if sum(math.prod(spot.shape) for _, plan, *_ in islands for spot in plan) > _MAX_VALUES:
        raise ValueError("sites of implausible size")
    found = Found(
        fingerprint=_optional(_digest, data["fingerprint"]),
        torch=_optional(_text, data["torch"]),
        sites=tuple(FoundSite(name, macs) for name, macs, _ in sites),
        floats=tuple(FloatSite(*entry) for entry in floats),
        islands=tuple(FoundIsland(*island) for island in islands),
    )
    kept = tuple(map(_text, _entries(data["kept"])))
    return Description(found, {name: ratio[0] for name, _, ratio in sites if ratio}, Exchanged(tuple(mlps), kept))


def _read_spot(entry: Any) -> Spot:
    op, index, function, line, occurrence, facts = entry
    key = SourceKey(_text(function), _whole(line), _whole(occurrence))
    place = key, _one_of(_OPERATIONS, op), _whole(index)
    if facts is None:
        return Spot(*place)
    if not set(facts) <= set(_FACTS) or op == "conv2d":
        raise ValueError("unknown facts of a site")
    shape = tuple(_whole(length) for length in _entries(facts["shape"]))
    equation = _optional(_text, facts.get("equation"))
    if len(shape) != _SHAPES.get(op, 1) or (op == "einsum") != (equation is not None):
        raise ValueError(f"facts of a site that are not those of {op}")
    if equation is not None and einsum_form(equation) is None:
        raise ValueError(f"an einsum that is no product of matrices: {equation}")
    role = _optional(lambda value: _one_of(get_args(Role), value), facts.get("role"))
    weight, location = (_optional(_text, facts.get(name)) for name in ("weight", "location"))
    unit_length = _one_of((False, True), facts.get("unit_length", False))
    if unit_length and shape != (0,):
        raise ValueError("operands of length one along an axis that does not depend on the image")
    return Spot(*place, True, shape, role, equation, weight, location, unit_length)


def _with_names(value: Any) -> Iterator[list[Any]]:
    """Entries whose first two members, the name, are read."""
    name = ""
    for shared, rest, *more in _expanded(value):
        name = name[: _whole(shared, len(name))] + _text(rest)
        if len(name) > _MAX_NAME:
            raise ValueError(f"no name: {shown(name)}")
        yield [name, *more]


def _expanded(value: Any) -> list[Any]:
    """Inverse of :func:`_shortened`."""
    rows: list[Any] = []
    for row in _entries(value):
        if len(row) > 2:
            rows.append(row)
            continue
        back, length = row
        first = len(rows) - _whole(back, len(rows))
        for index in range(first, first + _whole(length, _MAX_ENTRIES - len(rows))):
            rows.append(rows[index])  # a run may go on into itself
    return rows


def _entries(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MAX_ENTRIES:
        raise ValueError(f"no list of plausible length: {shown(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f"no text: {shown(value)}")
    return value


def _digest(value: Any) -> str:
    if not _DIGEST.fullmatch(_text(value)):
        raise ValueError(f"no SHA-256: {shown(value)}")
    return str(value)


def _whole(value: Any, most: int = _MAX_VALUES) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"no plausible number: {shown(value)}")
    return value


def _number(values: list[T], index: Any) -> T:
    return values[_whole(index, len(values) - 1)]


def _one_of(choices: Iterable[T], value: Any) -> T:
    for choice in choices:
        if choice == value and type(choice) is type(value):
            return choice
    raise ValueError(f"unknown: {shown(value)}")


def _ratio(values: list[Any]) -> list[float | None]:
    """The ratio in dB, or null, of a quantized site; nothing of one in float."""
    plausible = (v is None or (type(v) in (int, float) and abs(v) <= _MAX_DB) for v in values)
    if len(values) > 1 or not all(plausible):
        raise ValueError(f"no ratio in dB: {shown(values)}")
    return values


def _optional(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)
