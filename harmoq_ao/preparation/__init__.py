"""Stage 1: a float model becomes a prepared one, with a site at every contraction.

Imports ``sites`` and ``zoo``, and what those may import. ``prepare`` is the entry; ``first_runs`` runs the float model,
``site_factory`` and ``swap`` place the sites, ``measure`` runs the prepared model.
"""
