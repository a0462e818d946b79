"""A quantized model on a CPU as one flat graph of fused kernels, for each size of image that it meets.

Reading order: ``record`` (what a model computes, as one graph), ``movements`` and ``views`` (windows, shifts and splits
as indices into matrices of tokens), ``plan`` (which operations run together), ``attention`` and ``rows`` (the fused
kernels), ``program`` (what a model keeps and calls).

Imports ``cpu_kernels``, ``kernels``, ``sites`` and ``graph``.
"""
