"""Passes over the modules of a converted model: float attention in one call, MLPs in one chain.

Reading order: ``fusing`` (what they share), ``attention_matching`` and ``attention`` (float attention in one call),
``probing`` and ``mlp``. What fuses more is made from a recorded forward: ``programs`` and ``gpu_programs``.

Imports ``sites``, ``graph`` and ``kernels``.
"""
