"""The modules that stand at sites: prepared (float, observed, fake-quantized) and quantized (integer codes)."""

from harmoq_ao.sites.forms import MatmulForm
from harmoq_ao.sites.prepared import (
    PreparedAttention,
    PreparedConv2d,
    PreparedLinear,
    PreparedMatmul,
    PreparedSite,
    quiet,
)
from harmoq_ao.sites.quantized import (
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedMatmul,
    QuantizedSite,
)

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
