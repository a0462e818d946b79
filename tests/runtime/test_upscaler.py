"""Models by name, and images of any form through them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from harmoq_ao import HarmoqConfig, calibrate, convert_harmoq, prepare_harmoq, save_quantized
from harmoq_ao.common.errors import CheckpointError, ConfigError, InputError, SavedModelError
from harmoq_ao.images import image_from_array
from harmoq_ao.runtime.upscaler import Upscaler, of_loaded, of_quantized, open_float, open_model
from harmoq_ao.zoo.checkpoints import LoadedModel
from tests.models import BY_NAME, converted


class Doubling(nn.Module):
    """Repeats every pixel; refuses sizes as real models do."""

    def __init__(self, multiple: int = 1, minimum: int = 0, square: bool = False) -> None:
        super().__init__()
        self.multiple, self.minimum, self.square = multiple, minimum, square
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        assert height % self.multiple == 0
        assert width % self.multiple == 0
        assert min(height, width) >= self.minimum
        assert height == width or not self.square
        self.calls += x.shape[0]
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize(
    ("multiple", "minimum", "square"), [(1, 0, False), (8, 0, False), (4, 30, False), (1, 16, False), (8, 24, True)]
)
@pytest.mark.parametrize("size", [(7, 5), (33, 20), (16, 16), (100, 30)])
@pytest.mark.parametrize("tile", [None, 32])
def test_any_size_fits_any_requirement(
    multiple: int, minimum: int, square: bool, size: tuple[int, int], tile: int | None
) -> None:
    upscaler = Upscaler(
        Doubling(multiple, minimum, square), "x", 2, size_multiple=multiple, size_minimum=minimum, square=square
    )
    image = torch.rand(1, 3, *size)
    expected = image.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(upscaler(image, tile, 8), expected)


def test_a_quantized_model_takes_square_images_where_its_float_one_does(tmp_path: Path) -> None:
    uformer = BY_NAME["Uformer"]
    loaded = LoadedModel(uformer.build(), "Uformer", 1, 3, 3, size_multiple=64, square=True)
    prepared = prepare_harmoq(loaded, HarmoqConfig(), uformer.example())  # type: ignore[arg-type]
    calibrate(prepared, [uformer.example(seed=1)], show_progress=False)
    folder = save_quantized(convert_harmoq(prepared), tmp_path / "uformer")
    image = torch.rand(1, 3, 70, 30, generator=torch.Generator().manual_seed(2))
    expected = of_loaded(loaded, "float")(image)
    actual = open_model(folder)(image)
    assert actual.shape == expected.shape == image.shape
    assert (actual - expected).square().mean() < 1e-2 * expected.var()


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 2)])
@pytest.mark.parametrize("tile", [None, 16])
def test_small_images_of_a_model_whose_minimum_nobody_states(size: tuple[int, int], tile: int | None) -> None:
    model = converted("SwinIR/light", HarmoqConfig(8, 8))
    assert model.traits.size_minimum == 0
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3))
    found = of_quantized(model, "x")(image, tile, 4)
    stated = replace(of_quantized(model, "x"), size_minimum=16)
    assert found.shape[-2:] == (2 * size[0], 2 * size[1])
    assert torch.equal(found, stated(image, tile, 4))


def test_a_model_of_one_channel_keeps_colour_and_takes_gray_once() -> None:
    model = Doubling()
    upscaler = Upscaler(model, "x", 2, channels=1)
    image = torch.rand(1, 3, 6, 8)
    assert torch.equal(upscaler(image), image.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert model.calls == 3
    assert upscaler(image[:, :1].expand(-1, 3, -1, -1)).shape == (1, 1, 12, 16)
    assert model.calls == 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kinds", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_decoded_images_and_rows_give_what_tensors_give(channels: int, kinds: int, dtype: type) -> None:
    array = np.random.default_rng(0).random((21, 18, kinds))
    record = image_from_array((array * (1 if dtype is np.float32 else np.iinfo(dtype).max)).astype(dtype))
    upscaler = Upscaler(Doubling(4, 8), "x", 2, channels, size_multiple=4, size_minimum=8)
    for tile in (None, 12):
        expected = upscaler(record.pixels[None], tile, 4)
        assert expected.shape[1] == (1 if channels == 1 and kinds < 3 else 3)
        assert torch.equal(upscaler(record, tile, 4), expected)
        bands = list(upscaler.rows(record, tile, 4))
        assert torch.equal(torch.cat(bands, -2), expected)
        assert len(bands) == (1 if tile is None else 3)


@pytest.mark.parametrize(
    ("message", "error", "found"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes", InputError, "--tile"),
        ("shapes cannot be multiplied", RuntimeError, "multiplied"),
    ],
)
def test_running_out_of_memory_says_to_use_tiles_and_other_errors_stay(
    message: str, error: type[Exception], found: str
) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(message)

    with pytest.raises(error, match=found):
        Upscaler(Failing(), "x", 2)(torch.rand(1, 3, 8, 8))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A float checkpoint of a small model."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(dict(BY_NAME["SwinIR/light"].build().state_dict()), path)
    return path


def test_checkpoints_open_with_their_traits(checkpoint: Path) -> None:
    upscaler = open_model(checkpoint)
    assert (upscaler.scale, upscaler.channels, upscaler.quantized) == (2, 3, False)
    image = BY_NAME["SwinIR/light"].example()
    low = open_model(checkpoint, torch.bfloat16)(image)
    assert low.dtype == torch.float32
    assert 0 < float((low - upscaler(image)).abs().max()) < 0.1


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="demo:x2 or demo:x3"):
        open_float("demo:x5")
    with pytest.raises(CheckpointError, match="no such file"):
        open_model(tmp_path / "nothing.pth")
    with pytest.raises(SavedModelError):
        open_model(tmp_path)


def test_other_float_types_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        open_model(checkpoint, torch.float64)


def test_models_of_other_value_ranges_are_out_of_scope(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmoq_ao.runtime.upscaler._OTHER_RANGES", {"SwinIR": "values in -1..1"})
    with pytest.raises(CheckpointError, match="out of scope"):
        open_model(checkpoint)
