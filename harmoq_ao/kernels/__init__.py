"""One operator on one device: CPU kernels, operators for ``torch.compile``, and the choice among kernels.

Imports ``quant``, and ``triton_kernels`` late, when one of its kernels is chosen. Passes that fuse several sites are in
``lowering``.
"""
