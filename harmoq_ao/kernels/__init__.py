"""One operator on one device: kernels of a CPU, operators for ``torch.compile``, and the choice among them.

Imports ``quant``, and ``triton_kernels`` where one is chosen. A pass that fuses several sites is in ``lowering``.
"""
