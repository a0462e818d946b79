"""Post-training quantization of image super-resolution transformers to 8, 4, 3 and 2 bits, run on integers.

::

    prepared = prepare_harmoq(model, HarmoqConfig(weight_bits=4, act_bits=4))
    calibrate(prepared, images)
    quantized = convert_harmoq(prepared)

Rooms, in the order in which data flows; each imports only from those above it (`make check` holds it to that):

=================  ===================================================================================================
``common``         errors, progress, output files, devices, ranks
``images``         image files, data sets, calibration crops, PSNR and SSIM
``quant``          the arithmetic: quantizers, bounds, observers, joint scales and shifts, the integer reference
``config``         what to quantize, and to how many bits
``graph``          FX islands: the author's forward as a graph, for every image size
``zoo``            float checkpoints
``kernels``        one operator on one device, and which kernel runs it
``sites``          the modules that stand at contractions, prepared and quantized; reports
``lowering``       passes that put one fused kernel in place of several sites
``preparation``    1. a float model becomes a prepared one
``calibration``    2. images are observed, bounds are solved
``harmonization``  3. Algorithm 1 of the paper, and refinement of the whole network
``conversion``     4. a prepared model becomes an integer one; saving and loading
``runtime``        5. tiles, upscaling, evaluation, OpenVINO, ``torch.compile``
``baselines``      published methods on the same sites, and mixed precision
``export``         ONNX, ``torch.export``, float checkpoints
``reporting``      the HTML report
``cli``            the command ``harmoq``
=================  ===================================================================================================

``triton_kernels`` and ``recipes`` lie at the top of the repository and are imported from here.

Names are imported from their rooms when they are first used: importing this package imports nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from harmoq_ao.common.version import __version__

if TYPE_CHECKING:
    from harmoq_ao.baselines import BASELINES
    from harmoq_ao.baselines.methods import METHODS, prepare_with
    from harmoq_ao.baselines.mixed_precision import mix_bits
    from harmoq_ao.calibration.calibrate import calibrate
    from harmoq_ao.calibration.solve import compute_qparams, disable_fake_quant, enable_fake_quant
    from harmoq_ao.common.errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        HarmoqError,
        ImageError,
        InputError,
        KernelError,
        SavedModelError,
        TraceError,
    )
    from harmoq_ao.config import HarmoqConfig, SiteRule
    from harmoq_ao.conversion.convert import convert_harmoq
    from harmoq_ao.conversion.load import load_quantized
    from harmoq_ao.conversion.model import QuantizedModel
    from harmoq_ao.conversion.save import save_quantized
    from harmoq_ao.export import export_checkpoint, export_onnx, export_program
    from harmoq_ao.harmonization.harmonize import HarmonizeTrace, harmonize
    from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
    from harmoq_ao.harmonization.presets import PRESETS, HarmonizeSettings
    from harmoq_ao.harmonization.settings import RefineSettings
    from harmoq_ao.images import CalibrationCrops, find_images, from_hf_dataset, load_image, load_pairs, save_image
    from harmoq_ao.images.metrics import psnr_y, ssim_y
    from harmoq_ao.preparation.prepare import prepare_harmoq
    from harmoq_ao.reporting import write_report
    from harmoq_ao.runtime.compiled import compile_model
    from harmoq_ao.runtime.evaluation import evaluate
    from harmoq_ao.runtime.openvino import lower_openvino
    from harmoq_ao.runtime.upscaler import Upscaler
    from harmoq_ao.sites.model import PreparedModel
    from harmoq_ao.sites.report import Report, SiteRow
    from harmoq_ao.zoo.checkpoints import load_demo_model, load_model

_ROOMS = {
    "baselines": "BASELINES",
    "baselines.methods": "METHODS prepare_with",
    "baselines.mixed_precision": "mix_bits",
    "calibration.calibrate": "calibrate",
    "calibration.solve": "compute_qparams disable_fake_quant enable_fake_quant",
    "common.errors": "CalibrationError CheckpointError ConfigError HarmoqError "
    "ImageError InputError KernelError SavedModelError TraceError",
    "config": "HarmoqConfig SiteRule",
    "conversion.convert": "convert_harmoq",
    "conversion.load": "load_quantized",
    "conversion.model": "QuantizedModel",
    "conversion.save": "save_quantized",
    "export": "export_checkpoint export_onnx export_program",
    "harmonization.harmonize": "HarmonizeTrace harmonize",
    "harmonization.paper.settings": "AlgorithmSettings",
    "harmonization.presets": "PRESETS HarmonizeSettings",
    "harmonization.settings": "RefineSettings",
    "images": "CalibrationCrops find_images from_hf_dataset load_image load_pairs save_image",
    "images.metrics": "psnr_y ssim_y",
    "preparation.prepare": "prepare_harmoq",
    "sites.model": "PreparedModel",
    "reporting": "write_report",
    "runtime.compiled": "compile_model",
    "runtime.evaluation": "evaluate",
    "runtime.openvino": "lower_openvino",
    "runtime.upscaler": "Upscaler",
    "sites.report": "Report SiteRow",
    "zoo.checkpoints": "load_demo_model load_model",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = [
    "BASELINES",
    "METHODS",
    "PRESETS",
    "AlgorithmSettings",
    "CalibrationCrops",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "HarmonizeSettings",
    "HarmonizeTrace",
    "HarmoqConfig",
    "HarmoqError",
    "ImageError",
    "InputError",
    "KernelError",
    "PreparedModel",
    "QuantizedModel",
    "RefineSettings",
    "Report",
    "SavedModelError",
    "SiteRow",
    "SiteRule",
    "TraceError",
    "Upscaler",
    "__version__",
    "calibrate",
    "compile_model",
    "compute_qparams",
    "convert_harmoq",
    "disable_fake_quant",
    "enable_fake_quant",
    "evaluate",
    "export_checkpoint",
    "export_onnx",
    "export_program",
    "find_images",
    "from_hf_dataset",
    "harmonize",
    "load_demo_model",
    "load_image",
    "load_model",
    "load_pairs",
    "load_quantized",
    "lower_openvino",
    "mix_bits",
    "prepare_harmoq",
    "prepare_with",
    "psnr_y",
    "save_image",
    "save_quantized",
    "ssim_y",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its room when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
