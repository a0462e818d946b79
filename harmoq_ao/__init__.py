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
``export``         ONNX, OpenVINO IR, ``torch.export``, float checkpoints
``reporting``      the HTML report
``cli``            the command ``harmoq``
=================  ===================================================================================================

``triton_kernels`` and ``recipes`` lie at the top of the repository and are imported from here.

A public name is imported from its room when it is first used, so importing this package imports neither torch nor any
room.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public names, each from the room that defines it; `_homes` reads them from here
    from harmoq_ao.baselines import BASELINES as BASELINES
    from harmoq_ao.baselines.methods import prepare_with as prepare_with
    from harmoq_ao.baselines.mixed_precision import Mixture as Mixture
    from harmoq_ao.baselines.mixed_precision import mix_bits as mix_bits
    from harmoq_ao.calibration.calibrate import calibrate as calibrate
    from harmoq_ao.calibration.solve import compute_qparams as compute_qparams
    from harmoq_ao.calibration.solve import disable_fake_quant as disable_fake_quant
    from harmoq_ao.calibration.solve import enable_fake_quant as enable_fake_quant
    from harmoq_ao.common.allocator import keep_memory as keep_memory
    from harmoq_ao.common.choices import FIXED_TILE as FIXED_TILE
    from harmoq_ao.common.choices import METHODS as METHODS
    from harmoq_ao.common.choices import Runtime as Runtime
    from harmoq_ao.common.errors import CalibrationError as CalibrationError
    from harmoq_ao.common.errors import CheckpointError as CheckpointError
    from harmoq_ao.common.errors import CompilerError as CompilerError
    from harmoq_ao.common.errors import ConfigError as ConfigError
    from harmoq_ao.common.errors import DatasetError as DatasetError
    from harmoq_ao.common.errors import ExportError as ExportError
    from harmoq_ao.common.errors import HarmoqError as HarmoqError
    from harmoq_ao.common.errors import ImageError as ImageError
    from harmoq_ao.common.errors import InputError as InputError
    from harmoq_ao.common.errors import KernelError as KernelError
    from harmoq_ao.common.errors import OpenVinoError as OpenVinoError
    from harmoq_ao.common.errors import OutputError as OutputError
    from harmoq_ao.common.errors import RankLostError as RankLostError
    from harmoq_ao.common.errors import RayError as RayError
    from harmoq_ao.common.errors import SavedModelError as SavedModelError
    from harmoq_ao.common.errors import TraceError as TraceError
    from harmoq_ao.common.version import __version__ as __version__
    from harmoq_ao.config import HarmoqConfig as HarmoqConfig
    from harmoq_ao.config import SiteRule as SiteRule
    from harmoq_ao.conversion.convert import convert_harmoq as convert_harmoq
    from harmoq_ao.conversion.load import load_quantized as load_quantized
    from harmoq_ao.conversion.model import QuantizedModel as QuantizedModel
    from harmoq_ao.conversion.save import float_bytes as float_bytes
    from harmoq_ao.conversion.save import folder_bytes as folder_bytes
    from harmoq_ao.conversion.save import save_quantized as save_quantized
    from harmoq_ao.export import export_checkpoint as export_checkpoint
    from harmoq_ao.export import export_onnx as export_onnx
    from harmoq_ao.export import export_openvino as export_openvino
    from harmoq_ao.export import export_program as export_program
    from harmoq_ao.harmonization.harmonize import HarmonizeTrace as HarmonizeTrace
    from harmoq_ao.harmonization.harmonize import harmonize as harmonize
    from harmoq_ao.harmonization.paper.settings import AlgorithmSettings as AlgorithmSettings
    from harmoq_ao.harmonization.presets import PRESETS as PRESETS
    from harmoq_ao.harmonization.presets import HarmonizeSettings as HarmonizeSettings
    from harmoq_ao.harmonization.settings import RefineSettings as RefineSettings
    from harmoq_ao.images import CalibrationCrops as CalibrationCrops
    from harmoq_ao.images import EncodedImage as EncodedImage
    from harmoq_ao.images import ImagePair as ImagePair
    from harmoq_ao.images import ImageRecord as ImageRecord
    from harmoq_ao.images import find_images as find_images
    from harmoq_ao.images import from_hf_dataset as from_hf_dataset
    from harmoq_ao.images import image_files as image_files
    from harmoq_ao.images import load_image as load_image
    from harmoq_ao.images import load_pairs as load_pairs
    from harmoq_ao.images import save_image as save_image
    from harmoq_ao.images import save_rows as save_rows
    from harmoq_ao.images import skimage_photographs as skimage_photographs
    from harmoq_ao.images import split_photographs as split_photographs
    from harmoq_ao.images.metrics import psnr_y as psnr_y
    from harmoq_ao.images.metrics import ssim_y as ssim_y
    from harmoq_ao.preparation.prepare import prepare_harmoq as prepare_harmoq
    from harmoq_ao.reporting import write_report as write_report
    from harmoq_ao.runtime.compiled import compile_model as compile_model
    from harmoq_ao.runtime.evaluation import EvaluationTable as EvaluationTable
    from harmoq_ao.runtime.evaluation import evaluate as evaluate
    from harmoq_ao.runtime.fixed_size import fixed_size as fixed_size
    from harmoq_ao.runtime.openvino import lower_openvino as lower_openvino
    from harmoq_ao.runtime.tiling import upscale as upscale
    from harmoq_ao.runtime.upscaler import Upscaler as Upscaler
    from harmoq_ao.runtime.upscaler import open_float as open_float
    from harmoq_ao.runtime.upscaler import open_model as open_model
    from harmoq_ao.sites.model import PreparedModel as PreparedModel
    from harmoq_ao.sites.report import Report as Report
    from harmoq_ao.sites.report import SiteRow as SiteRow
    from harmoq_ao.zoo import LoadedModel as LoadedModel
    from harmoq_ao.zoo import load_demo_model as load_demo_model
    from harmoq_ao.zoo import load_model as load_model


def _homes() -> dict[str, str]:
    """The module of each public name: what is imported above for type checkers."""
    source = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If))
    return {a.name: str(n.module) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}


_HOMES = _homes()
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its room when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
