"""Comparison of exported files, in every installed engine, with the model they were made from."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import ExportError
from harmoq_ao.export.program import load_program
from harmoq_ao.images import ImagePair
from harmoq_ao.runtime.evaluation import EvaluationTable, evaluate
from harmoq_ao.runtime.tiling import pad_to_multiple
from harmoq_ao.runtime.upscaler import Upscaler, open_float

logger = logging.getLogger(__name__)

Run = Callable[[Tensor], Tensor]
"""Maps `[1, C, H, W]` to `[1, C, H * scale, W * scale]`."""


def onnx_engines(path: Path) -> dict[str, Run]:
    """ONNX Runtime and OpenVINO for an ONNX file, on the CPU in float32; those that are installed and accept it.

    OpenVINO rejects some graphs that compute attention masks for free sizes, which is logged as a warning.
    """
    openers = {"ONNX Runtime": ("onnxruntime", _onnxruntime), "OpenVINO": ("openvino", _openvino)}
    found: dict[str, Run] = {}
    for name, (package, opened) in openers.items():
        if importlib.util.find_spec(package) is None:
            continue
        try:
            found[name] = opened(path)
        except Exception as error:  # engines raise errors of any type
            logger.warning("%s does not take %s: %s", name, path.name, str(error).strip().splitlines()[-1])
    return found


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its own choice for int4 weights rounds float activations to 8 bits, block by block.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Without it, pairs of 8-bit products saturate at 16 bits on CPUs without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: torch.from_numpy(session.run(None, {name: image.contiguous().numpy()})[0])


def _openvino(path: Path) -> Run:
    import openvino as ov

    from harmoq_ao.runtime.openvino.compiling import compile_on_cpu
    from harmoq_ao.runtime.openvino.ops import pairs_saturate

    if pairs_saturate():
        logger.warning("OpenVINO's sums of 7 and 8-bit products saturate on this CPU: see docs/runtimes.md")
    model = ov.Core().read_model(str(path))
    # One image: with a free number, the plugin's passes fail on some transposes of windows.
    model.reshape(ov.PartialShape([1, *model.input(0).partial_shape[1:]]))
    compiled = compile_on_cpu(model, INFERENCE_PRECISION_HINT="f32", INFERENCE_NUM_THREADS=torch.get_num_threads())
    return lambda image: torch.cat([torch.from_numpy(compiled(one.numpy())[0].copy()) for one in image.split(1)])


def engines(path: Path, kind: str) -> dict[str, Run]:
    """What can run an exported file, by name.

    Args:
        path: The file.
        kind: ``onnx``, ``openvino``, ``program`` or ``checkpoint``.
    """
    if kind == "onnx":
        return onnx_engines(path)
    if kind == "openvino":
        return {"OpenVINO": _openvino(path)}
    if kind == "program":
        return {"torch.export": load_program(path)}
    return {"float checkpoint": open_float(path).model}


def compare(
    path: Path,
    kind: str,
    upscaler: Upscaler,
    size: tuple[int, int] | None,
    pairs: list[ImagePair],
    multiple: int = 1,
    on_image: Callable[[str], None] | None = None,
) -> dict[str, EvaluationTable]:
    """Fidelity of the model and of its exported file in each engine, with the same tiles.

    Args:
        path: The file.
        kind: ``onnx``, ``openvino``, ``program`` or ``checkpoint``.
        upscaler: The model it was made from.
        size: Size of its images, which becomes that of the tiles, or None where it is free.
        pairs: Low-resolution images and their references.
        multiple: What sides must be multiples of where the size is free.
        on_image: Called with its name after each image of each engine.

    Raises:
        ExportError: The size is not square, or no engine is installed.
    """
    if size is not None and size[0] != size[1]:
        raise ExportError("Tiles are square", found=f"{size[0]}x{size[1]}", expected="a square size for a comparison")
    found = engines(path, kind)
    if not found:
        raise ExportError(
            "Nothing is installed that runs this file",
            expected="onnxruntime or openvino",
            remedy='pip install "harmoq-ao[onnx]"',
        )
    tile = None if size is None else size[0]
    results: dict[str, EvaluationTable] = {}
    runs: dict[str, Run] = {"harmoq_ao": upscaler.model, **found}
    for name, run in runs.items():
        tiled = replace(upscaler, model=_OneSize(run, tile or multiple, upscaler.scale))
        results[name] = evaluate(_Call(tiled, tile), pairs, upscaler.scale, on_image=on_image)
    return results


class _Call:
    """An upscaler with its tile."""

    def __init__(self, upscaler: Upscaler, tile: int | None) -> None:
        self.upscaler, self.tile = upscaler, tile

    def __call__(self, image: Tensor) -> Tensor:
        return self.upscaler(image, self.tile, 32 if self.tile is None or self.tile > 32 else self.tile // 2)


class _OneSize(nn.Module):
    """A model for sides that are multiples of one number; others are mirrored up to that and cropped back."""

    def __init__(self, run: Run, side: int, scale: int) -> None:
        super().__init__()
        self.run, self.side, self.scale = run, side, scale

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        padded, (height, width) = pad_to_multiple(image, self.side)
        rows = [self.run(row) for row in padded.split(1)]  # gray models get the channels as a batch
        return torch.cat(rows)[..., : height * self.scale, : width * self.scale]
