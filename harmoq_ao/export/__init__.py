"""Quantized models for other tools: ONNX, OpenVINO IR, `torch.export` programs, float checkpoints.

Imports ``runtime`` and what that may import; onnx, onnxscript and openvino only within calls.
"""

from harmoq_ao.export.checkpoint import checkpoint_state, export_checkpoint
from harmoq_ao.export.onnx import Exported, export_onnx
from harmoq_ao.export.openvino import export_openvino
from harmoq_ao.export.program import export_program, load_program

__all__ = [
    "Exported",
    "checkpoint_state",
    "export_checkpoint",
    "export_onnx",
    "export_openvino",
    "export_program",
    "load_program",
]
