"""The modules that stand at contractions: prepared (float, observed, fake-quantized) and quantized (integer codes).

Imports ``config``, ``images``, ``quant``, ``graph`` and ``kernels``. Reading order: ``site`` (what a contraction is),
``base`` and ``prepared``, ``attention``, ``quantized``; ``model``, ``report`` and ``history`` are of whole models.
"""

from harmoq_ao.sites.attention import PreparedAttention
from harmoq_ao.sites.base import PreparedSite, quiet
from harmoq_ao.sites.forms import MatmulForm
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear, PreparedMatmul
from harmoq_ao.sites.quantized import QuantizedConv2d, QuantizedLinear, QuantizedMatmul, QuantizedSite

__all__ = [
    "MatmulForm",
    "PreparedAttention",
    "PreparedConv2d",
    "PreparedLinear",
    "PreparedMatmul",
    "PreparedSite",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedMatmul",
    "QuantizedSite",
    "quiet",
]
