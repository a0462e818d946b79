"""Post-training quantization of image super-resolution transformers to 8, 4, 3 and 2 bits, run on integers.

::

    prepared = prepare_harmoq(model, HarmoqConfig(weight_bits=4, act_bits=4))
    calibrate(prepared, images)
    quantized = convert_harmoq(prepared)
"""

__version__ = "0.1.0"

from harmoq_ao import _torchao as _torchao  # first: what follows imports torchao
from harmoq_ao.calibrate import calibrate, compute_qparams, disable_fake_quant, enable_fake_quant
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.convert import QuantizedModel, convert_harmoq
from harmoq_ao.errors import HarmoqError
from harmoq_ao.prepare import PreparedModel, prepare_harmoq
from harmoq_ao.report import Report, SiteRow
from harmoq_ao.serialization import load_quantized, save_quantized
from harmoq_ao.zoo import load_demo_model, load_model

__all__ = [
    "HarmoqConfig",
    "HarmoqError",
    "PreparedModel",
    "QuantizedModel",
    "Report",
    "SiteRow",
    "SiteRule",
    "calibrate",
    "compute_qparams",
    "convert_harmoq",
    "disable_fake_quant",
    "enable_fake_quant",
    "load_demo_model",
    "load_model",
    "load_quantized",
    "prepare_harmoq",
    "save_quantized",
]
