"""The arithmetic of quantization, on tensors alone: quantizers, bounds, packing, observers, joint scales.

The integer reference, which every kernel must equal, is here too.

Imports ``common``.
"""
