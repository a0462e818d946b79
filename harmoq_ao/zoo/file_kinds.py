"""What a file or folder is that somebody gave as a checkpoint, and is none."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

_HEAD = 512
_MOST_CONFIG = 1 << 20  # bytes of a config file that is looked into


class Kind(NamedTuple):
    """What it is, and what to do about it."""

    found: str
    remedy: str


_DOWNLOAD = "download the file itself (on a hub: the link `resolve/main`, or `raw`), not the page about it"
_UNPACK = "unpack it and give the checkpoint in it"
_CONVERTED = "give the PyTorch checkpoint that it was converted from"
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs", Kind("a Git LFS pointer, which stands for the file", "fetch it with `git lfs pull`")),
    (b"7767517", Kind("an ncnn network", _CONVERTED)),
    (b"GGUF", Kind("a GGUF file", _CONVERTED)),
    (b"\x89HDF\r\n", Kind("an HDF5 file (Keras)", _CONVERTED)),
    (b"ftrt", Kind("a TensorRT engine", _CONVERTED)),
    (b"\x89PNG", Kind("a PNG picture", "give the weights of a model")),
    (b"\xff\xd8\xff", Kind("a JPEG picture", "give the weights of a model")),
    (b"\x1f\x8b", Kind("a gzip archive", _UNPACK)),
    (b"7z\xbc\xaf", Kind("a 7-Zip archive", _UNPACK)),
    (b"Rar!", Kind("a RAR archive", _UNPACK)),
    (b"<?xml", Kind("an XML file (OpenVINO's, perhaps)", _CONVERTED)),
)


def kind_of_file(path: Path) -> Kind | None:
    """What a file is, by its first bytes; None where they do not tell."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head")):
        return Kind("an HTML page", _DOWNLOAD)
    if text.startswith((b"{", b"[")):
        return Kind("a JSON file", "give the weights that it belongs to")
    if path.suffix.lower() == ".onnx" or _is_onnx(head):
        return Kind("an ONNX model", _CONVERTED)
    if path.suffix.lower() == ".bin" and path.with_suffix(".param").is_file():
        return Kind("weights of an ncnn network", _CONVERTED)
    return _kind_of_zip(path) if head.startswith(b"PK") else None


def _is_onnx(head: bytes) -> bool:
    """Whether a file begins as ONNX's ModelProto: its version, then the producer, the graph or operator sets."""
    return len(head) > 2 and head[0] == 0x08 and head[1] < 32 and head[2] in (0x12, 0x3A, 0x42)


def _kind_of_zip(path: Path) -> Kind | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    if any("exported_program" in name or name.endswith("archive_format") for name in names):
        return Kind("a program of torch.export", _CONVERTED)
    if any(name.endswith("data.pkl") for name in names):
        return None
    return Kind("a ZIP archive", _UNPACK)


def kind_of_folder(folder: Path) -> Kind:
    """What a folder is that is no model of transformers."""
    if is_saved_model(folder):
        return Kind(
            "a quantized model that was saved here already",
            "give the float checkpoint to quantize it anew, or run this one with harmoq upscale",
        )
    inside = sorted(f.name for f in folder.iterdir() if f.suffix in (".pth", ".pt", ".safetensors", ".ckpt", ".bin"))
    if inside:
        return Kind(f"a folder with {', '.join(inside[:3])}", f"give the file: {folder / inside[0]}")
    return Kind("a folder without weights", "give a checkpoint file")


def is_saved_model(folder: Path) -> bool:
    """Whether a folder holds a quantized model."""
    return config_of(folder).get("format") == "harmoq-ao"


def config_of(folder: Path) -> dict[str, object]:
    """The table in a folder's ``config.json``; empty without a readable one."""
    path = folder / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > _MOST_CONFIG * 16:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
