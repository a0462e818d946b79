"""Quantized models in OpenVINO: the model that runs them, the conversion, operations of sites, and merged views.

Imports what ``runtime`` may import. The package ``openvino`` itself is optional, and imported when a size is compiled.
"""

from harmoq_ao.runtime.openvino.conversion import convert_at, require_openvino
from harmoq_ao.runtime.openvino.model import Layer, OpenVinoModel, lower_openvino

__all__ = ["Layer", "OpenVinoModel", "convert_at", "lower_openvino", "require_openvino"]
