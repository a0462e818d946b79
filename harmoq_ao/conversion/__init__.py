"""Stage 4: a prepared model becomes one that holds integer codes; saving and loading it.

Imports ``calibration``, ``lowering`` and what those may import.
"""
