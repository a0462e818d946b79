"""A model prepared without being run, from what an earlier preparation found; and what one has found, read off it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from harmoq_ao.common.errors import SavedModelError, shown
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph import IslandState, is_island, island_state, leave_fast_path, make_island
from harmoq_ao.graph.exchange import original_class
from harmoq_ao.preparation.baking import bake_weights
from harmoq_ao.preparation.found import Found, FoundIsland, FoundSite, Spot
from harmoq_ao.preparation.site_factory import SiteFactory, without_folders
from harmoq_ao.preparation.swap import module_site, replace_modules
from harmoq_ao.sites.base import PreparedSite, quiet
from harmoq_ao.sites.model import ModelTraits, PreparedModel
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.sites.report import SiteRow
from harmoq_ao.sites.site import FloatCause, FloatSite, Site

#: Functions of torch that tracing follows into.
_OF_TORCH = frozenset({"multi_head_attention_forward"})


def restore(model: nn.Module, config: HarmoqConfig, found: Found, traits: ModelTraits) -> PreparedModel:
    """Prepare a model as :func:`prepare_harmoq` does, without running it and without observers.

    Graphs are traced when a call needs them; they meet the sites by their places in the source.

    Args:
        model: Float model of the fingerprint that `found` has, in evaluation mode; changed in place.
        config: What to quantize.
        found: What preparing such a model found. It may come from a file: names that the model does not have, and
            sites that the configuration does not allow, are refused.
        traits: Of the model.

    Raises:
        SavedModelError: `found` is of another model.
        ConfigError: A rule matches no site.
    """
    leave_fast_path(model)
    bake_weights(model)
    prepared = PreparedModel(model, config, traits)
    prepared.fingerprint = found.fingerprint
    prepared.floats = list(found.floats)
    for left in found.floats:
        if left.reason.cause is FloatCause.SETTINGS and config.settings(left.name, left.kind).reason is None:
            raise _unfit("The configuration quantizes what is float", left.name)
    factory = SiteFactory(config, [], ready=True)
    swaps: dict[nn.Module, nn.Module] = {
        _module(model, s.name): _module_site(prepared, s) for s in found.sites if "::" not in s.name
    }
    for island in found.islands:
        _make_island(model, island, factory)
    replace_modules(model, swaps)
    sites = {site.site.name: site for site in prepared.sites()}
    if sorted(sites) != sorted(s.name for s in found.sites):
        odd = sorted(set(sites) ^ {s.name for s in found.sites})
        raise _unfit("Sites and islands contradict one another", odd[:1])
    prepared.order = [sites[s.name].site.path for s in found.sites]
    for entry in found.sites:
        _settle(sites[entry.name], config, entry)
    config.check_rules([(s.site.name, s.site.kind) for s in sites.values()] + [(f.name, f.kind) for f in found.floats])
    return prepared


def _settle(module: PreparedSite, config: HarmoqConfig, entry: FoundSite) -> None:
    """What a site knows of itself once it is prepared."""
    module.site.macs = entry.macs
    module.settle(config.settings(module.site.name, module.site.kind))


def _module(model: nn.Module, name: str) -> nn.Module:
    """A submodule by a name that may be any text."""
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        module = None if module is None else module._modules.get(part)
    if module is None:
        raise _unfit("A module is missing", name)
    return module


def _module_site(prepared: PreparedModel, entry: FoundSite) -> PreparedSite:
    """The site of a linear layer or a convolution."""
    site = module_site(prepared, entry.name, _module(prepared.model, entry.name), fixed=False, macs=entry.macs)
    if site is None:
        raise _unfit("A module is no site", entry.name)
    return site


def _make_island(model: nn.Module, island: FoundIsland, factory: SiteFactory) -> None:
    module = _module(model, island.name)
    if is_island(module) or isinstance(module, PreparedSite):
        raise _unfit("A module is an island twice", island.name)
    make_island(module, IslandState(island.name, factory, quiet=quiet, float_reason=island.float_reason))
    for spot in island.spots:
        taken = (island.name, spot.key) in factory.known or spot.attribute in module._modules
        if taken or not _has_weight(module, spot):
            raise _unfit(f"{island.name} has no place for a site", spot.label)
        factory.place(module, island.name, spot)


def _has_weight(module: nn.Module, spot: Spot) -> bool:
    """Whether the weight of a functional linear is a parameter of the island, of the shape that was found."""
    if spot.weight is None:
        return True
    owner, _, name = spot.weight.rpartition(".")
    parameter = _module(module, owner)._parameters.get(name)
    return parameter is not None and tuple(parameter.shape) == spot.shape


def _unfit(what: str, found: object) -> SavedModelError:
    return SavedModelError(
        f"{what}: the sites are not those of the model",
        found=shown(found),
        remedy="copy the folder again, or quantize the float model anew",
    )


# --- reading it off ---------------------------------------------------------------------------------------------------


def found_in(model: nn.Module, rows: list[SiteRow], fingerprint: str | None) -> Found:
    """What the preparation of a model found; inverse of :func:`restore`.

    Args:
        model: The author's model, prepared or converted.
        rows: Report rows of its preparation.
        fingerprint: Of the float model.
    """
    islands = [m for m in model.modules() if is_island(m)]
    sites = [site for site in map(_site_of, model.modules()) if site is not None]
    names = {row.name for row in rows}
    by_name = {site.name: site for site in sites}
    known = {site.name for site in sites if site.name in names}
    return Found(
        fingerprint=fingerprint,
        torch=str(torch.__version__) if any(map(_is_in_torch, islands)) else None,
        sites=tuple(FoundSite(row.name, row.macs) for row in rows if row.name in known),
        floats=tuple(_float_site(row) for row in rows if row.name not in known),
        islands=tuple(_found_island(m, by_name, known) for m in islands),
    )


def _site_of(module: nn.Module) -> Site | None:
    return module.site if isinstance(module, (PreparedSite, QuantizedSite)) else None


def _float_site(row: SiteRow) -> FloatSite:
    assert row.reason is not None
    return FloatSite(row.name, row.kind, row.reason, row.macs)


def _found_island(module: nn.Module, sites: dict[str, Site], known: set[str]) -> FoundIsland:
    state = island_state(module)
    assert isinstance(state.site_factory, SiteFactory)
    spots = []
    for spot in state.site_factory.spots(state.qualname):
        name = f"{state.qualname}::{spot.label}"
        parts = (f"{name}.qk", f"{name}.av") if spot.op == "sdpa" else (name,)
        if not spot.is_site:
            spots.append(spot)
        elif known.issuperset(parts):  # else it was met after preparation, and is met again
            shape = tuple(length for part in parts for length in sites[part].shape)
            spots.append(replace(spot, shape=shape, unit_length=sites[parts[0]].unit_length))
    reason = None if state.float_reason is None else without_folders(state.float_reason)
    return FoundIsland(state.qualname, tuple(spots), reason)


def _is_in_torch(island: nn.Module) -> bool:
    """Whether contractions of an island stand in the Python code of torch, whose lines change with its version."""
    state = island_state(island)
    assert isinstance(state.site_factory, SiteFactory)
    functions = {spot.key.function for spot in state.site_factory.spots(state.qualname)}
    return original_class(island).__module__.startswith("torch.") or bool(functions & _OF_TORCH)
