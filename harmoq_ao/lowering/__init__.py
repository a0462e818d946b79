"""Passes that put one fused kernel in place of several sites: attention, window attention, MLPs.

Imports ``sites``, ``graph``, ``kernels`` and ``triton_kernels``.
"""
