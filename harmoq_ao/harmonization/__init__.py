"""Stage 3, harmonization: Algorithm 1 of the paper (``paper/``), then refinement against the float network.

Imports ``calibration``, ``lowering`` and what those may import.
"""
