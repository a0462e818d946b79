"""Fused integer kernels for CPUs, in C++: one operation per file, its plain torch reference beside it.

``library`` builds ``csrc/`` at first use for an instruction set that this machine has (``instruction_sets``), with its
compiler (``compiler``), into a cache (``build_cache``); each other file declares one operator, its fake implementation
and its reference.

Imports ``quant`` and ``common``.
"""
