"""From a model to islands: FX graphs of only those modules whose own ``forward`` issues contractions.

A super-resolution model stays its author's Python, with every image size and branch intact. A module that calls
``matmul``, ``bmm``, ``einsum``, ``scaled_dot_product_attention`` or functional ``linear`` itself becomes an *island*:
its ``forward`` is traced by :class:`IslandTracer` into one FX graph per calling pattern, in
which every contraction is a call to a site module.

Reading order: ``contractions`` (what is looked for), ``proxies`` and ``namespaces`` (how Python is followed),
``tracer`` (one forward to one graph), ``island`` (which graph to run), ``discovery`` (which modules to trace).
"""

from harmoq_ao.graph.contractions import Contraction, einsum_form
from harmoq_ao.graph.discovery import Discovery, discovering
from harmoq_ao.graph.island import IslandState, finish_graphs, is_island, island_state, make_island, same_values
from harmoq_ao.graph.proxies import GuardFailed
from harmoq_ao.graph.tracer import IslandTracer, Variant, trace_island

__all__ = [
    "Contraction",
    "Discovery",
    "GuardFailed",
    "IslandState",
    "IslandTracer",
    "Variant",
    "discovering",
    "einsum_form",
    "finish_graphs",
    "is_island",
    "island_state",
    "make_island",
    "same_values",
    "trace_island",
]
