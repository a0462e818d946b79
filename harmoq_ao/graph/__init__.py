"""From a model to islands: FX graphs of only those modules whose own ``forward`` issues contractions.

A super-resolution model stays its author's Python, with every image size and branch intact. A module that calls
``matmul``, ``bmm``, ``einsum``, ``scaled_dot_product_attention`` or functional ``linear`` itself becomes an *island*:
its ``forward`` is traced by :class:`IslandTracer` into one FX graph per calling pattern, in
which every contraction is a call to a site module.

Reading order: ``contractions`` (what is looked for), ``proxies``, ``handles`` and ``namespaces`` (how Python is
followed), ``tracer`` and ``trace`` (one forward to one graph), ``variant`` (a compiled graph), ``exchange`` and
``island`` (which graph to run), ``folding`` (constants), ``discovery`` (which modules to trace).

Imports ``common`` alone.
"""

from harmoq_ao.graph.calls import same_values
from harmoq_ao.graph.contractions import Contraction, einsum_form
from harmoq_ao.graph.discovery import Discovery, FunctionCall, discovering
from harmoq_ao.graph.island import IslandState, Phase, finish_graphs, is_island, island_state, make_island
from harmoq_ao.graph.torch_attention import leave_fast_path, without_fast_path
from harmoq_ao.graph.variant import Variant

__all__ = [
    "Contraction",
    "Discovery",
    "FunctionCall",
    "IslandState",
    "Phase",
    "Variant",
    "discovering",
    "einsum_form",
    "finish_graphs",
    "is_island",
    "island_state",
    "leave_fast_path",
    "make_island",
    "same_values",
    "without_fast_path",
]
