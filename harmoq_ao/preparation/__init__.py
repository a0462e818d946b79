"""Stage 1: a float model becomes a prepared one, with a site at every contraction.

Imports ``sites`` and ``zoo``, and what those may import.
"""
