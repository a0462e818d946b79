"""The modules that stand at sites: prepared (float, observed, fake-quantized) and quantized (integer codes)."""

from harmoq_ao.modules.forms import MatmulForm
from harmoq_ao.modules.prepared import (
    PreparedAttention,
    PreparedConv2d,
    PreparedLinear,
    PreparedMatmul,
    PreparedSite,
    quiet,
)
from harmoq_ao.modules.quantized import (
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
