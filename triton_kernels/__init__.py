"""Low-bit Triton kernels, one operation per file, each with its reference in plain torch beside it.

Imports ``common.errors`` and ``quant``. Device functions are in ``device`` and ``attention_device``, operands in the
kernels' layout in ``operands`` and ``attention_operands``, checks of arguments in ``launch``.
"""
