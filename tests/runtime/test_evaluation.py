"""Evaluation of a model on pairs of images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from harmoq_ao.common.errors import InputError
from harmoq_ao.images import image_from_array, load_pairs
from harmoq_ao.images.metrics import score
from harmoq_ao.runtime.evaluation import EvaluationTable, evaluate


def repeat(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def benchmark(root: Path, gray: bool = False) -> Path:
    for index, name in enumerate(("b", "a")):
        low = pixels(20, 24, index)
        for path, array in (
            (root / "HR" / f"{name}.png", np.clip(low.repeat(2, 0).repeat(2, 1) + np.uint8(index), 0, 255)),
            (root / "LR_bicubic" / "X2" / f"{name}x2.png", low),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array[..., 0] if gray else array).save(path)
    return root


def test_scores_are_those_of_the_protocol_and_names_keep_their_order(tmp_path: Path) -> None:
    pairs = load_pairs(benchmark(tmp_path), None, 2)
    seen: list[str] = []
    table = evaluate(repeat, pairs, 2, on_image=seen.append)
    assert list(table.scores) == seen == ["a", "b"]
    for pair in pairs:
        low, high = pair.load()
        assert table.scores[pair.name] == score(repeat(low.pixels[None]), high.to_uint8(), 2)
    assert math.isinf(table.scores["b"].psnr)
    assert math.isfinite(table.scores["a"].psnr)
    assert all(seconds > 0 for seconds in table.seconds.values())


def test_tiles_give_the_same_scores(tmp_path: Path) -> None:
    pairs = load_pairs(benchmark(tmp_path), None, 2)
    assert evaluate(repeat, pairs, 2, tile=12, overlap=4).scores == evaluate(repeat, pairs, 2).scores


def test_gray_files_and_gray_results(tmp_path: Path) -> None:
    pairs = load_pairs(benchmark(tmp_path, gray=True), None, 2)
    colour = evaluate(repeat, pairs, 2)
    gray = evaluate(lambda x: repeat(x)[:, :1], pairs, 2)
    assert gray.scores["a"].psnr == pytest.approx(colour.scores["a"].psnr, abs=1e-9)


def test_results_are_plain_data(tmp_path: Path) -> None:
    table = evaluate(lambda x: repeat(x) * 0.9, load_pairs(benchmark(tmp_path), None, 2), 2)
    data = json.loads(json.dumps(table.to_dict()))
    assert data["mean"]["psnr_y"] == pytest.approx((data["images"]["a"]["psnr_y"] + data["images"]["b"]["psnr_y"]) / 2)
    assert data["mean"]["seconds"] == pytest.approx(table.mean_seconds)


def test_bad_input() -> None:
    image = image_from_array(pixels(24, 24))
    twice = [("a", image, image)] * 2
    with pytest.raises(InputError, match="same name"):
        evaluate(lambda x: x, twice, 1)
    with pytest.raises(InputError, match="differ in size"):
        evaluate(repeat, [("a", image, image)], 2)
    with pytest.raises(InputError, match="no scores to average"):
        EvaluationTable().to_dict()
    assert math.isnan(EvaluationTable().mean_seconds)
    assert torch.is_tensor(image.pixels)
