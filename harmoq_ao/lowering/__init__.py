"""Passes that put one fused kernel in place of several sites: attention, window attention, MLPs.

Reading order: ``fusing`` (what they share), ``attention_matching`` and ``attention`` (float attention in one call),
``attention_core`` and ``core_rewriting`` (integer products in one kernel), ``probing``, ``window_recognition`` and
``window_attention`` (from qkv to projection in one kernel), ``mlp``, ``survey`` (which kernel computes which site).

Imports ``sites``, ``graph``, ``kernels`` and ``triton_kernels``.
"""
