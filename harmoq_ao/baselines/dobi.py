"""DOBI: ranges found by search, the first stage of 2DQuant."""

from __future__ import annotations

from harmoq_ao.baselines.base import Baseline


class DOBI(Baseline):
    """Distribution-oriented bound initialization: the range of least squared quantization error, by search.

    Source: Liu, Qin, Guo, Yuan, Kong, Chen, Zhang: "2DQuant: Low-bit post-training quantization for image
    super-resolution", NeurIPS 2024, section on its first stage.

    Different here: both bounds are searched independently, on a grid that is refined around the best pair, for every
    activation; the paper moves them inwards together (bell-shaped operands) or moves the upper one alone (attention
    maps, after softmax), and both of its paths are among our candidates up to the grid. Weights take symmetric bounds
    per row, where the paper has one pair for the tensor, and their squared error is weighted by the mean square of the
    input channels.
    """

    name = "dobi"
    title = "DOBI"
    observer = "mse"
