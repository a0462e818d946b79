"""Image files to float tensors and back: grayscale, alpha, palette, 16 bits, and what can be wrong with a file.

Pillow reads and writes. It holds colour at 8 bits only, so it reads 16-bit colour in two passes (torchvision would read
such a PNG in one, but was seen to crash the process on a truncated file); tifffile writes 16-bit TIFF, and a 16-bit PNG
is written here, since no library at hand writes one.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import sys
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from harmoq_ao.errors import ImageError, InputError, OutputError

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Array = npt.NDArray[Any]

MAX_PIXELS = 178_956_970
"""Largest image read by default, in pixels (Pillow's own limit against decompression bombs)."""

WRITABLE = {
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}
"""File suffixes that `save_image` takes, with Pillow's name of the format."""

_DEEP_FORMATS = ("PNG", "TIFF")
_ALPHA_FORMATS = ("PNG", "TIFF", "WEBP")
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}
_CONVERTIBLE_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_ORIENTATION_TAG = 0x0112
# By which layout the low bytes of 16-bit samples are read as if they were the high ones; N is the machine's order.
_LOW_BYTES = {
    "LA;16B": "RGBA",
    **{f"{colour};16{order}": f"{colour};16{other}" for colour in ("RGB", "RGBA") for order, other in ("BL", "LB")},
    **{f"{colour};16N": f"{colour};16{'B' if sys.byteorder == 'little' else 'L'}" for colour in ("RGB", "RGBA")},
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LUMA = (0.299, 0.587, 0.114)
# What Pillow and its decoders raise for bytes that are not what they claim to be.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True)
class ImageRecord:
    """A decoded image, and what is needed to write its upscaled version in the same form.

    Attributes:
        pixels: `[3, H, W]`, float32, 0..1, RGB as displayed (EXIF rotation applied), not multiplied by alpha.
        alpha: `[1, H, W]`, float32, 0..1, or ``None`` for an opaque image.
        grayscale: Whether the source had no colour; ``pixels`` then holds three equal channels.
        bit_depth: 8 or 16, the precision per channel that was read.
        mode: Pillow's mode of the source, such as ``L``, ``P``, ``I;16`` or ``CMYK``.
        icc_profile: The colour profile to write back, if there was one for gray or RGB.
        path: Where the image came from.
    """

    pixels: torch.Tensor
    alpha: torch.Tensor | None = None
    grayscale: bool = False
    bit_depth: int = 8
    mode: str = "RGB"
    icc_profile: bytes | None = None
    path: Path | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def to_uint8(self) -> npt.NDArray[np.uint8]:
        """The colour at 8 bits, `[H, W, 3]`."""
        codes: npt.NDArray[np.uint8] = (self.pixels * 255.0).round().to(torch.uint8).movedim(0, -1).contiguous().numpy()
        return codes


def load_image(path: PathLike, max_pixels: int = MAX_PIXELS) -> ImageRecord:
    """Read an image file of any mode as RGB.

    Palettes are expanded, transparency of every kind becomes ``alpha``, CMYK is converted without its profile, the
    EXIF rotation is applied, and of an animation the first frame is taken. 16 bits are kept for gray images, for
    colour PNG and TIFF; a warning is logged where a layout (such as separate colour planes) is read at 8 bits instead.

    Args:
        path: The file.
        max_pixels: Larger images are refused before they are decoded; beyond the default, Pillow's own limit has to be
            raised too.

    Raises:
        ImageError: If the file is missing, empty, truncated, corrupt, no image, without pixels, or too large.
    """
    path = Path(path)
    _check_file(path)
    return replace(_decoded(lambda: path, str(path), path.stat().st_size, max_pixels), path=path)


@dataclass(frozen=True, order=True)
class EncodedImage:
    """An image file in memory, decoded when asked for.

    Attributes:
        row: Its place among the others; images are ordered by it.
        name: What errors call it.
        data: The bytes of the file.
    """

    row: int
    name: str
    data: bytes = field(repr=False)

    def load(self) -> ImageRecord:
        """Decode it, as `load_image` does with a file.

        Raises:
            ImageError: As in `load_image`.
        """
        return _decoded(lambda: io.BytesIO(self.data), self.name, len(self.data), MAX_PIXELS)


def _decoded(opened: Callable[[], Path | BinaryIO], name: str, size: int, max_pixels: int) -> ImageRecord:
    """The image of a file of ``size`` bytes, which is opened more than once where it holds 16-bit colour."""
    try:
        with _without_bomb_warning(), Image.open(opened()) as image:
            _check_size(image.size, max_pixels)
            rawmode = _colour_rawmode(image)
            deep = _read_deep_colour(opened, name, rawmode) if ";16" in rawmode else None
            return _record_from_pillow(image, name) if deep is None else deep
    except Image.DecompressionBombError as error:
        raise _in_file(name, _too_large(str(error).rstrip("."), max_pixels)) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image",
            found=f"{size} bytes of no known image format",
            expected="PNG, JPEG, TIFF, WebP, BMP or another format that Pillow reads",
            remedy="check that the file was downloaded or copied as a whole, and is what its name says",
        ) from error
    except ImageError as error:
        raise _in_file(name, error) from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read", found="permission denied", remedy="change its mode") from error
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"{name} is corrupt or truncated",
            found=f"{type(error).__name__}: {error}",
            expected="a complete image file",
            remedy="download or copy the file again, or leave it out",
        ) from error


def image_from_pillow(image: Image.Image) -> ImageRecord:
    """A Pillow image as a record, as `load_image` does with a file (colour at 8 bits).

    Raises:
        ImageError: If it has no pixels, cannot be decoded, or its values have no known range.
    """
    _check_size(image.size, MAX_PIXELS)
    try:
        return _record_from_pillow(image, getattr(image, "filename", "") or "An image")
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(
            "An image is corrupt or truncated",
            found=f"{type(error).__name__}: {error}",
            expected="a complete image",
            remedy="leave it out of the data",
        ) from error


def image_from_array(array: Array) -> ImageRecord:
    """An array as a record: `[H, W]` or `[H, W, C]` with C of 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA).

    Args:
        array: uint8, uint16, bool, or float in 0..1.

    Raises:
        ImageError: If shape, dtype or values are none of these.
    """
    channels = array[:, :, None] if array.ndim == 2 else array
    if channels.ndim != 3 or channels.shape[2] not in (1, 2, 3, 4) or 0 in channels.shape:
        raise ImageError(
            "an array is not an image",
            found=f"shape {list(array.shape)}",
            expected="[H, W] or [H, W, C] with C of 1 to 4 and no side of 0",
        )
    unit, bit_depth = _unit_range(channels)
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(unit, 2, 0)))
    colours = tensor.shape[0] - (tensor.shape[0] + 1) % 2
    return ImageRecord(
        pixels=tensor[:colours].expand(3, -1, -1).contiguous(),
        alpha=tensor[colours:].clone() if tensor.shape[0] > colours else None,
        grayscale=colours == 1,
        bit_depth=bit_depth,
        mode={1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[tensor.shape[0]],
    )


def image_size(path: PathLike) -> tuple[int, int]:
    """Height and width of an image file as displayed, from its header alone.

    Raises:
        ImageError: If the file is missing or its header is not an image's.
    """
    path = Path(path)
    _check_file(path)
    try:
        with _without_bomb_warning(), Image.open(path) as image:
            sideways = image.getexif().get(_ORIENTATION_TAG, 1) >= 5
            if sideways and image.format == "TIFF":
                # Whether the header's size is turned already depends on Pillow's version; the loaded one always is.
                image.load()
                sideways = image.getexif().get(_ORIENTATION_TAG, 1) >= 5
            width, height = image.size
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise ImageError(f"The size of {path} cannot be read", found=f"{type(error).__name__}: {error}") from error
    return (width, height) if sideways else (height, width)


def save_image(path: PathLike, tensor: torch.Tensor, like: ImageRecord | None = None) -> None:
    """Write an image in the form of the one it was made from, whole or not at all.

    The file is written beside its target and renamed, so an interrupted write leaves the old file intact. Of ``like``
    are taken: grayscale (by BT.601 luma), 16 bits (PNG and TIFF), the colour profile, and the alpha channel, which is
    resized bicubically. Formats without alpha or 16 bits lose them with a logged warning. Palette and CMYK images are
    written as RGB, and so is 16-bit gray with alpha in TIFF, which few readers take. JPEG is written at quality 95
    without chroma subsampling, WebP lossless.

    Args:
        path: Target; its suffix, one of `WRITABLE`, picks the format. The folder must exist.
        tensor: `[3, H, W]`, `[1, H, W]` or with a leading batch dimension of 1; floating; clamped to 0..1.
        like: The source image's record.

    Raises:
        InputError: If the tensor is not one image of finite values.
        OutputError: If the suffix is unknown, or the file cannot be written (no folder, no permission, disk full).
    """
    path = Path(path)
    check_image_tensor(tensor)
    if tensor.ndim == 4 and tensor.shape[0] != 1:
        raise InputError(
            "A file holds one image", found=f"a batch of {tensor.shape[0]}", remedy="save the images one by one"
        )
    pillow_format = WRITABLE.get(path.suffix.lower())
    if pillow_format is None:
        raise OutputError(
            f"{path} cannot be written",
            found=f"suffix '{path.suffix}'",
            expected=f"one of {', '.join(WRITABLE)}",
            remedy="rename the output",
        )
    image = tensor.detach().reshape(tensor.shape[-3:]).to(device="cpu", dtype=torch.float32).clamp(0.0, 1.0)
    codes = _codes_to_write(image, like, pillow_format, path)
    # Encoded in memory: given a file on a full disk, Pillow ends a JPEG early without an error.
    buffer = io.BytesIO()
    try:
        _encode(buffer, codes, pillow_format, like.icc_profile if like is not None else None)
    except (ValueError, OSError) as error:
        raise OutputError(
            f"{path} cannot be encoded",
            found=f"{codes.shape[1]}x{codes.shape[0]} pixels: {error}",
            expected=f"an image that {pillow_format} can hold",
            remedy="choose another format, such as PNG",
        ) from error
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


@contextmanager
def atomic_write(path: PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends, and vanishes if the block raises.

    Raises:
        OutputError: For every ``OSError`` on the way; what was at ``path`` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path} could not be written",
            found=f"{type(error).__name__}: {error.strerror or error}",
            expected="an existing folder, permission to write there, and enough space",
            remedy="free some space or choose another place; an older file of this name was left as it was",
        ) from error
    finally:
        # The rename has consumed it on success; on any exception, KeyboardInterrupt too, nothing half-written stays.
        with suppress(OSError):
            temporary.unlink()


def check_image_tensor(x: object, channels: tuple[int, ...] = (1, 3), batched: bool | None = None) -> None:
    """Refuse what no model should be given.

    Args:
        x: Meant to be `[C, H, W]` or `[B, C, H, W]`, floating and finite.
        channels: The channel counts that are accepted.
        batched: Whether a batch dimension must be (``True``) or must not be (``False``) there; ``None`` takes both.

    Raises:
        InputError: If it is not a tensor, or has the wrong rank, channels or dtype, is empty, or holds NaN or infinity.
    """
    if not isinstance(x, torch.Tensor):
        raise InputError("This is not a tensor", found=type(x).__name__, expected="a torch.Tensor [B, C, H, W]")
    ranks = {None: (3, 4), True: (4,), False: (3,)}[batched]
    layout = " or ".join("[B, C, H, W]" if rank == 4 else "[C, H, W]" for rank in ranks)
    if x.ndim not in ranks:
        raise InputError(
            "The image tensor has the wrong rank",
            found=f"shape {list(x.shape)}",
            expected=layout,
            remedy="add a batch dimension with x[None], or take one image with x[0]",
        )
    if not x.is_floating_point():
        raise InputError(
            "The image tensor has the wrong type",
            found=x.dtype,
            expected="a floating type with values in 0..1",
            remedy="convert 8-bit pixels with x.float() / 255",
        )
    if 0 in x.shape:
        raise InputError("The image tensor is empty", found=f"shape {list(x.shape)}", expected="no side of 0")
    if x.shape[-3] not in channels:
        raise InputError(
            "The image tensor has the wrong number of channels",
            found=f"{x.shape[-3]} (shape {list(x.shape)})",
            expected=f"{' or '.join(map(str, channels))}, in the layout {layout}",
            remedy="move the channels before height and width, and split off alpha",
        )
    if torch.compiler.is_compiling():
        return  # values are not known yet
    finite = torch.isfinite(x)
    if not finite.all():
        raise InputError(
            "The image tensor holds values that are no numbers",
            found=f"{int((~finite).sum())} NaN or infinite values of {x.numel()}",
            expected="finite values in 0..1",
            remedy="check how the image was read or computed",
        )


def _check_file(path: Path) -> None:
    if not path.exists():
        raise ImageError(f"{path} does not exist", expected="an image file", remedy="check the path")
    if not path.is_file():
        raise ImageError(f"{path} is not a file", found="a folder or device", expected="an image file")
    if path.stat().st_size == 0:
        raise ImageError(
            f"{path} is empty", found="0 bytes", expected="an image file", remedy="download or copy the file again"
        )


@contextmanager
def _without_bomb_warning() -> Iterator[None]:
    """Pillow warns at half the size that `load_image` refuses; one clear error is enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _in_file(name: str, error: ImageError) -> ImageError:
    return ImageError(f"{name}: {error.what}", found=error.found, expected=error.expected, remedy=error.remedy)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width == 0 or height == 0:
        raise ImageError("the image has no pixels", found=f"{width}x{height}", expected="at least 1x1")
    if width * height > max_pixels:
        raise _too_large(f"{width}x{height} = {width * height} pixels", max_pixels)


def _too_large(found: str, max_pixels: int) -> ImageError:
    return ImageError(
        "the image is too large, or a decompression bomb",
        found=found,
        expected=f"at most {max_pixels} pixels",
        remedy="cut it into parts; if you trust the file, raise max_pixels and PIL.Image.MAX_IMAGE_PIXELS",
    )


def _record_from_pillow(image: Image.Image, name: str = "An image") -> ImageRecord:
    if getattr(image, "n_frames", 1) > 1:
        logger.warning("%s has several frames; only the first is used", name)
    mode = image.mode
    image.load()
    return _finished(image, _array_from_pillow(image), mode)


def _finished(image: Image.Image, array: Array, mode: str) -> ImageRecord:
    """The record of a loaded image's samples, upright."""
    # Asked after loading: Pillow applies the orientation of a TIFF itself while loading, and then forgets it.
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    record = image_from_array(_oriented(array, orientation))
    return replace(record, mode=mode, icc_profile=image.info.get("icc_profile") if mode != "CMYK" else None)


def _array_from_pillow(image: Image.Image) -> Array:
    """`[H, W]` or `[H, W, C]` of a type that `image_from_array` takes, transparency expanded to a channel."""
    mode = image.mode
    if mode.startswith("I"):
        return _array_from_integers(np.asarray(image))
    if mode == "F":
        return np.asarray(image)
    if mode not in _CONVERTIBLE_MODES:
        raise ImageError(
            "the image's colour model is not handled",
            found=f"mode {mode}",
            expected="gray, RGB, palette, CMYK, YCbCr or HSV",
            remedy="convert the image to RGB",
        )
    transparent = "transparency" in image.info or mode in ("PA", "RGBA", "RGBa", "LA", "La")
    if mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("LA" if transparent else "L"))
    return np.asarray(image.convert("RGBA" if transparent else "RGB"))


def _array_from_integers(values: Array) -> Array:
    """Pillow's 32-bit mode holds 16-bit images; anything beyond has no agreed white."""
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            "the image holds integers of more than 16 bits",
            found=f"values {values.min()} to {values.max()}",
            expected="0 to 65535",
            remedy="scale it to 16 bits",
        )
    return values.astype(np.uint16)


def _unit_range(array: Array) -> tuple[npt.NDArray[np.float32], int]:
    """Values in 0..1 as float32, and the bit depth they came with."""
    if array.dtype == np.bool_:
        return array.astype(np.float32), 8
    if array.dtype in (np.uint8, np.uint16):
        depth = array.dtype.itemsize * 8
        return array.astype(np.float32) / np.float32(2**depth - 1), depth
    if array.dtype.kind == "f":
        if np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0:
            return array.astype(np.float32), 16
        found = f"floats from {array.min()} to {array.max()}"
    else:
        found = f"dtype {array.dtype}"
    raise ImageError(
        "the image's values have no known range",
        found=found,
        expected="8 or 16 bits without sign, or floats in 0..1",
        remedy="scale the image to one of these",
    )


def _oriented(array: Array, orientation: int) -> Array:
    """Undo an EXIF orientation, 1..8; unknown values count as upright."""
    if orientation >= 5 and orientation <= 8:
        array = np.swapaxes(array, 0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _colour_rawmode(image: Image.Image) -> str:
    """How Pillow's decoder was told that samples are laid out in a colour file, ``RGB;16B`` for one; or nothing."""
    tile = getattr(image, "tile", None)
    if image.mode not in ("RGB", "RGBA") or image.format not in ("PNG", "TIFF") or not tile:
        return ""
    arguments = tile[0][3]
    rawmode = arguments if isinstance(arguments, str) else arguments[0]
    return rawmode if isinstance(rawmode, str) else ""


def _read_deep_colour(opened: Callable[[], Path | BinaryIO], name: str, rawmode: str) -> ImageRecord | None:
    """16-bit colour at full precision, or ``None`` for layouts of which only 8 bits can be read.

    Pillow keeps the high byte of each sample. Told that the byte order is the other one it keeps the low byte, so two
    passes of its (hardened) decoder give both.
    """
    swapped = _LOW_BYTES.get(rawmode)
    if swapped is None:
        logger.warning("%s has 16 bits per channel but is read at 8: layout %s is not handled", name, rawmode)
        return None
    with Image.open(opened()) as low:
        low.tile = [_with_rawmode(tile, swapped) for tile in low.tile]
        low.load()
        low_bytes = np.asarray(low)
    if rawmode == "LA;16B":  # four bytes a pixel, which the swapped mode read as they are
        array = low_bytes.view(">u2").astype(np.uint16)
        return _finished(low, array, "LA;16")
    with Image.open(opened()) as high:
        high.load()
        array = np.asarray(high).astype(np.uint16) << 8 | low_bytes
    return _finished(high, array, f"{high.mode};16")


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    arguments = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
    # A plain tuple up to Pillow 10, a named one since.
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _codes_to_write(image: torch.Tensor, like: ImageRecord | None, pillow_format: str, path: Path) -> Array:
    """`[H, W, C]` of uint8 or uint16: colour or gray, with alpha where the format holds it."""
    depth, alpha = 8, None
    if like is not None:
        if like.grayscale and image.shape[0] == 3:
            image = (image * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True).clamp(max=1.0)
        depth, alpha = like.bit_depth, like.alpha
    if depth == 16 and pillow_format not in _DEEP_FORMATS:
        logger.warning("%s: %s holds 8 bits per channel; the other 8 are dropped", path, pillow_format)
        depth = 8
    if alpha is not None and pillow_format not in _ALPHA_FORMATS:
        logger.warning("%s: %s holds no transparency; the alpha channel is dropped", path, pillow_format)
        alpha = None
    if alpha is not None:
        if pillow_format == "TIFF" and depth == 16:
            image = image.expand(3, -1, -1)
        image = torch.cat([image, _resized(alpha, (image.shape[-2], image.shape[-1]))])
    codes = (image.movedim(0, -1) * (2**depth - 1)).round().numpy()
    return np.ascontiguousarray(codes.astype(np.uint16 if depth == 16 else np.uint8))


def _resized(alpha: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize of one channel `[1, H, W]`, clamped to 0..1 since bicubic overshoots."""
    if alpha.shape[-2:] == size:
        return alpha
    plane = Image.fromarray(alpha[0].numpy()).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(plane)).clamp(0.0, 1.0)[None]


def _encode(file: BinaryIO, codes: Array, pillow_format: str, icc_profile: bytes | None) -> None:
    channels = codes.shape[2]
    if codes.dtype == np.uint16 and pillow_format == "PNG":
        file.write(_encode_deep_png(codes, icc_profile))
    elif codes.dtype == np.uint16:
        _encode_deep_tiff(file, codes, icc_profile)
    else:
        # Pillow infers the mode from the number of channels: L, LA, RGB, RGBA.
        image = Image.fromarray(codes[:, :, 0] if channels == 1 else codes)
        options = dict(_SAVE_OPTIONS.get(pillow_format, {}))
        if icc_profile is not None:
            options["icc_profile"] = icc_profile
        image.save(file, format=pillow_format, **options)


def _encode_deep_png(codes: Array, icc_profile: bytes | None) -> bytes:
    """A 16-bit PNG (ISO/IEC 15948): big-endian samples, rows unfiltered, one compressed stream."""
    height, width, channels = codes.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = np.zeros((height, 1 + width * channels * 2), dtype=np.uint8)
    rows[:, 1:] = codes.astype(">u2").reshape(height, -1).view(np.uint8)
    chunks = [_png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    if icc_profile is not None:
        chunks.append(_png_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile)))
    chunks += [_png_chunk(b"IDAT", zlib.compress(rows.tobytes())), _png_chunk(b"IEND", b"")]
    return _PNG_SIGNATURE + b"".join(chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _encode_deep_tiff(file: BinaryIO, codes: Array, icc_profile: bytes | None) -> None:
    import tifffile

    channels = codes.shape[2]
    tifffile.imwrite(
        file,
        codes[:, :, 0] if channels == 1 else codes,
        photometric="rgb" if channels >= 3 else "minisblack",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unassalpha"] if channels == 4 else None,
        compression="zlib",
        iccprofile=icc_profile,
        metadata=None,
    )
