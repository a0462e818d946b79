"""Pipes and sparse files of 40 GB in the place of every file that is read: refused at once, with a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import harmoq_ao as h
from harmoq_ao.common.errors import HarmoqError
from harmoq_ao.harmonization.checkpoint import Checkpoint
from harmoq_ao.images import image_files, image_size, load_image
from harmoq_ao.images.hub import _read
from tests.models import build, converted

Load = Callable[[Path], object]
HUGE = 40 << 30


def _transformers(path: Path) -> object:
    (path.parent / "config.json").write_text(json.dumps({"architectures": ["Swin2SRForImageSuperResolution"]}))
    return h.load_model(path.rename(path.with_name("model.safetensors")).parent)


def _config(path: Path) -> object:
    return h.load_quantized(path.rename(path.with_name("config.json")).parent)


def _weights(path: Path) -> object:
    folder = h.save_quantized(converted("linears", h.HarmoqConfig(8, 8)), path.with_name("saved"))
    return h.load_quantized(Path(path.rename(next(folder.glob("*.safetensors")))).parent, build("linears"))


def _overwritten(path: Path) -> object:
    folder = path.rename(path.with_name("config.json")).parent
    return h.save_quantized(converted("linears", h.HarmoqConfig(8, 8)), folder)


LOADERS: dict[str, Load] = {
    "image": load_image,
    "size of an image": image_size,
    "checkpoint": h.load_model,
    "model of transformers": _transformers,
    "config of a saved model": _config,
    "weights of a saved model": _weights,
    "what a saved model would replace": _overwritten,
    "progress": lambda path: Checkpoint(path, {}).load(),
    "list of paths": lambda path: image_files([path.rename(path.with_suffix(".txt"))]),
    "image of a data set": lambda path: _read(str(path)),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["pipe", "sparse"])
def test_pipes_and_sparse_files_are_refused(loader: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, HUGE)
    with pytest.raises(HarmoqError):
        LOADERS[loader](path)
