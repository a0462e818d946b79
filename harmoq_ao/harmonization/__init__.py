"""Stage 3: Algorithm 1 of the paper (``paper/``), then refinement of the whole network against the float network.

Imports ``calibration``, ``lowering`` and what those may import.
"""
