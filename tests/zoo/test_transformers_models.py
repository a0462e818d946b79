"""Models of transformers: from a folder to a saved model and back, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import harmoq_ao as h
from harmoq_ao.common.errors import CheckpointError, SavedModelError
from harmoq_ao.graph import same_values
from harmoq_ao.zoo import architecture_spec, build_architecture
from tests.models import images

INSTALLED = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not INSTALLED, reason="transformers is not installed")


def swin2sr(upsampler: str = "pixelshuffledirect") -> nn.Module:
    """A small Swin2SR with random weights."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution  # type: ignore[import-not-found]

    small = {"image_size": 16, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = Swin2SRForImageSuperResolution(Swin2SRConfig(**small, upsampler=upsampler))
    return model.eval()


@needs_transformers
@pytest.mark.parametrize("upsampler", ["pixelshuffledirect", "pixelshuffle", "pixelshuffle_aux"])
def test_swin2sr_prepared_equals_the_original_and_every_contraction_is_a_site(upsampler: str) -> None:
    model = swin2sr(upsampler)
    prepared = h.prepare_harmoq(model, h.HarmoqConfig(profile="paper"), images(2))
    for size in ((16, 16), (8, 24)):
        image = images(1, size)[0]
        assert same_values(model(image), prepared(image))
    assert len(prepared.sites()) == 4 * (6 + 2)  # query, key, value, two of the output, MLP; two products
    left = prepared.report().left_float
    assert list(left) == ["convolutions stay in float unless conv_bits asks for them"]


@needs_transformers
def test_a_folder_is_quantized_saved_and_loaded_without_its_model(tmp_path: Path) -> None:
    model = swin2sr()
    model.save_pretrained(tmp_path / "float")  # type: ignore[operator]
    loaded = h.load_model(tmp_path / "float")
    assert (loaded.scale, loaded.size_multiple, loaded.output) == (2, 4, "reconstruction")
    quantized = h.convert_harmoq(h.calibrate(h.prepare_harmoq(loaded, None, images(2)), images(2)))
    h.save_quantized(quantized, tmp_path / "int")
    again = h.load_quantized(tmp_path / "int", verify=True)
    assert torch.equal(again(images(1)[0]).reconstruction, quantized(images(1)[0]).reconstruction)
    odd = images(1, (18, 21))[0]
    expected, actual = h.open_model(tmp_path / "float")(odd), h.open_model(tmp_path / "int")(odd)
    assert actual.shape == (1, 3, 36, 42)
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0)


@needs_transformers
def test_a_folder_of_the_hubs_cache_and_weights_that_are_not_complete(tmp_path: Path) -> None:
    model = swin2sr()
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    model.save_pretrained(snapshot)  # type: ignore[operator]
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("abc")
    assert h.load_model(tmp_path / "models--a--b").architecture == "Swin2SRForImageSuperResolution"
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"depths": [2, 4]}))
    with pytest.raises(CheckpointError, match="not complete"):
        h.load_model(snapshot)


@needs_transformers
@pytest.mark.parametrize("change", [{"window_size": "8"}, {"name_or_path": "x"}, {"embed_dim": 1 << 20}])
def test_a_description_that_was_changed_is_refused(change: dict[str, object]) -> None:
    spec = architecture_spec(swin2sr())
    assert same_values(build_architecture(spec).state_dict().keys(), swin2sr().state_dict().keys())
    with pytest.raises(SavedModelError, match="description of the architecture"):
        build_architecture(spec | {"hyperparameters": spec["hyperparameters"] | change})


@pytest.mark.skipif(INSTALLED, reason="transformers is installed")
def test_without_transformers_the_remedy_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Swin2SRForImageSuperResolution"]}')
    with pytest.raises(CheckpointError, match="pip install transformers"):
        h.load_model(tmp_path)
    spec = {"class": "transformers:Swin2SRForImageSuperResolution", "hyperparameters": {}}
    with pytest.raises(SavedModelError, match="pip install transformers"):
        build_architecture(spec)
