"""A quantized model on a GPU as one flat graph of fused kernels, for each size of image that it meets.

Reading order: ``lowering`` (what ``programs`` finds in a recorded forward, as steps for a GPU), ``operands`` (weights
made ready once per model), ``kernels``, ``tokenwise``, ``layout`` and ``torch_steps`` (what steps run), ``fusing``
(which steps one kernel computes), ``emit`` (the graph), ``replay`` (CUDA graphs), ``program`` (what a model keeps and
calls), ``survey`` (which kernel computes which site), ``counting`` (launches and bytes, without a GPU).

Imports ``programs``, ``kernels``, ``triton_kernels`` and what lies below them.
"""
