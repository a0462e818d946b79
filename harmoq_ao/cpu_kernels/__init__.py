"""Fused integer kernels for CPUs, in C++: one operation per file, its plain torch reference beside it.

``library`` builds ``csrc/`` at first use for the instruction set of this machine; each other file declares one operator,
its fake implementation and its reference.

Imports ``quant`` and ``common``.
"""
