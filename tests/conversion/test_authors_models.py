"""Models as authors write them, from float to saved: equal with rounding off, all contractions sites, copies equal."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import harmoq_ao as h
from harmoq_ao.common.errors import ConfigError, InputError
from harmoq_ao.graph import same_values
from tests import authors
from tests.models import images

PAPER = h.HarmoqConfig(profile="paper")
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "tuple": (authors.TupleOutput, 4),
    "dict": (authors.DictOutput, 4),
    "object": (authors.ObjectOutput, 4),
    "keyword": (authors.KeywordOnly, 4),
    "tied": (authors.Tied, 6),
    "normalised": (authors.Normalised, 4),
    "lora": (authors.Lora, 6),
    "einops": (authors.LocalImports, 3),
    "sdpa": (partial(authors.LocalImports, False), 3),
    "weights": (partial(authors.TorchAttention, "weights"), 4),
    "no weights": (partial(authors.TorchAttention, "no weights"), 4),
    "encoder": (partial(authors.TorchAttention, "encoder"), 12),
    "norm first": (partial(authors.TorchAttention, "norm first"), 12),
    "gelu": (partial(authors.TorchAttention, "gelu"), 12),
    "padded": (partial(authors.TorchAttention, "padded"), 12),
    "decoder": (partial(authors.TorchAttention, "decoder"), 11),
}
"""By name the model, and how many sites its linears and products are."""


@cache
def built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name][0]().eval()


@cache
def prepared_model(name: str) -> h.PreparedModel:
    return h.prepare_harmoq(built(name), PAPER, [images(1)[0], images(1, (16, 20))[0]])


@cache
def converted_model(name: str) -> h.QuantizedModel:
    return h.convert_harmoq(h.calibrate(copy.deepcopy(prepared_model(name)), images(2)))


def called(name: str, model: nn.Module, image: Tensor) -> Any:
    """As its author calls it, gradients on: torch's attention takes its Python then, as it does in training."""
    return model(lr=image) if name == "keyword" else model(image)


@pytest.mark.parametrize("name", MODELS)
def test_prepared_it_equals_the_original_and_every_contraction_is_a_site(name: str) -> None:
    prepared = prepared_model(name)
    for size in ((16, 16), (12, 24)):
        image = images(1, size, seed=7)[0]
        assert same_values(called(name, built(name), image), called(name, prepared, image))
    assert len(prepared.sites()) == MODELS[name][1]
    assert {f.kind for f in prepared.floats} == {"conv2d"}
    assert all(site.site.macs > 0 for site in prepared.sites())


@pytest.mark.parametrize("name", MODELS)
def test_saved_pickled_and_copied_it_computes_the_same(name: str, tmp_path: Path) -> None:
    quantized = converted_model(name)
    h.save_quantized(quantized, tmp_path)
    file = io.BytesIO()
    torch.save(quantized, file)
    file.seek(0)
    twins = {
        "loaded": h.load_quantized(tmp_path, model=built(name)),
        "pickled": pickle.loads(pickle.dumps(quantized)),
        "torch.save": torch.load(file, weights_only=False),
        "copied": copy.deepcopy(quantized),
    }
    for size in ((16, 16), (20, 12), (64, 64)):
        image = images(1, size, seed=8)[0]
        expected = called(name, quantized, image)
        for kind, twin in twins.items():
            assert same_values(expected, called(name, twin, image)), (kind, size)


def test_a_prepared_model_is_pickled_too() -> None:
    prepared = h.calibrate(copy.deepcopy(prepared_model("encoder")), images(2))
    twin = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(prepared(images(1)[0]), twin(images(1)[0]))
    assert [s.site for s in twin.sites()] == [s.site for s in prepared.sites()]


class Upscaled(Dataset[Tensor]):
    """Images that a quantized model makes in the workers of a loader."""

    def __init__(self, model: h.QuantizedModel) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return self.model.image(images(2)[index])[0]


def test_it_runs_in_workers_that_are_spawned() -> None:
    data = Upscaled(converted_model("tuple"))
    expected = torch.stack([data[0], data[1]])
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=multiprocessing.get_context("spawn"))
    (batch,) = loader
    assert torch.equal(batch, expected)


# --- outputs and calls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "scale"), [("tuple", "0", 1), ("dict", "large", 2), ("object", "reconstruction", 1)]
)
def test_the_image_in_the_output_is_found(name: str, path: str, scale: int) -> None:
    quantized = converted_model(name)
    assert (quantized.traits.output, quantized.traits.scale) == (path, scale)
    for size in ((16, 16), (64, 64)):
        image = images(1, size)[0]
        output = quantized(image)
        made = output[0] if name == "tuple" else output["large"] if name == "dict" else output.reconstruction
        assert type(output) is type(built(name)(image))
        torch.testing.assert_close(quantized.image(image), made, atol=0.02, rtol=0)  # kernels round otherwise
        torch.testing.assert_close(h.upscale(quantized, image, scale), made, atol=0.02, rtol=0)


def test_an_output_that_does_not_tell_has_to_be_named() -> None:
    model = authors.TwoImages().eval()
    with pytest.raises(InputError, match="more than one tensor can be the image") as caught:
        h.prepare_harmoq(model, PAPER, images(1)[0])
    assert "first [1, 3, 16, 16]; second [1, 3, 16, 16]" in str(caught.value.found)
    prepared = h.prepare_harmoq(model, PAPER, images(1)[0], output="second")
    assert torch.equal(prepared.image(images(1)[0]), model(images(1)[0]).second)
    with pytest.raises(InputError, match="holds no such tensor"):
        h.prepare_harmoq(model, PAPER, images(1)[0], output="third")


def test_refinement_learns_the_image_of_an_object() -> None:
    prepared = h.calibrate(copy.deepcopy(prepared_model("object")), images(2))
    settings = h.HarmonizeSettings(None, h.RefineSettings(steps=2, checks=1))
    trace = h.harmonize(prepared, [image[0] for image in images(2)], settings, held_out=[images(1, seed=9)[0][0]])
    assert trace.refine is not None
    assert len(trace.refine.losses) == 2


def test_the_image_is_given_by_position_or_by_its_name() -> None:
    image = images(1)[0]
    for model in (prepared_model("tied"), converted_model("tied")):
        assert torch.equal(model(image), model(image=image))
    quantized = converted_model("keyword")
    assert quantized.traits.keyword == "lr"
    assert torch.equal(quantized(image), quantized(lr=image))
    assert torch.equal(quantized(lr=image, factor=0.5), quantized(image) * 0.5)
    with pytest.raises(InputError, match="This call has no image"):
        quantized()


# --- what is for inference alone --------------------------------------------------------------------------------------


@cache
def _trainable() -> h.QuantizedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prepared = h.prepare_harmoq(authors.Trainable(), PAPER, images(1)[0])
    return h.convert_harmoq(h.calibrate(prepared, images(2)))


@pytest.mark.parametrize("told", ["itself", "the model within", "a pipeline around it"])
def test_training_mode_is_refused_by_name_and_changes_nothing(told: str, caplog: pytest.LogCaptureFixture) -> None:
    quantized = copy.deepcopy(_trainable())
    image = images(1)[0]
    expected, state = quantized(image), copy.deepcopy(quantized.state_dict())
    {"itself": quantized, "the model within": quantized.model}.get(told, nn.Sequential(quantized)).train()
    assert torch.equal(quantized(image), expected)
    assert "cannot be trained" in caplog.text
    assert not any(module.training for module in quantized.modules())
    assert all(torch.equal(value, state[name]) for name, value in quantized.state_dict().items())


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to(torch.float16),
        lambda model: model.to("cpu", torch.float64),
        lambda model: model.type(torch.float16),
        lambda model: nn.Sequential(model).half(),
    ],
)
def test_a_float_type_without_kernels_is_refused_and_nothing_changes(ask: Callable[[nn.Module], object]) -> None:
    quantized = copy.deepcopy(_trainable())
    expected = quantized(images(1)[0])
    with pytest.raises(ConfigError, match=r"no such float type.*bfloat16"):
        ask(quantized)
    assert torch.equal(quantized(images(1)[0]), expected)


@pytest.mark.parametrize(
    "ask", [lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: nn.Sequential(m).bfloat16()]
)
def test_a_call_for_bfloat16_is_what_set_float_dtype_does(ask: Callable[[nn.Module], object]) -> None:
    quantized, expected = copy.deepcopy(_trainable()), copy.deepcopy(_trainable()).set_float_dtype(torch.bfloat16)
    ask(quantized)
    assert quantized.float_dtype is torch.bfloat16
    assert torch.equal(quantized(images(1)[0]), expected(images(1)[0]))
    assert {b.dtype for s in quantized.sites().values() for n, b in s.named_buffers() if n == "codes"} == {torch.uint8}
    assert quantized.float().float_dtype is torch.float32
    for dtype in (torch.float16, torch.float64):
        assert quantized(images(1)[0].to(dtype)).dtype is dtype


# --- what stays float -------------------------------------------------------------------------------------------------


def test_functions_that_no_site_is_made_of_are_counted() -> None:
    report = h.prepare_harmoq(authors.Unsupported().eval(), PAPER, images(1)[0]).report()
    left = {r.name: r for r in report.rows if not r.quantized and r.kind != "conv2d"}
    assert set(left) == {"one::conv1d_0", "up::conv_transpose2d_0", "::tensordot_0"}
    assert left["::tensordot_0"].macs == left["one::conv1d_0"].macs == 256 * 16 * 16
    sentence = "5 contractions stay float: 3 have no integer form here; 2 convolutions stay in float"
    assert report.float_sentence().startswith(sentence)
    assert sentence in str(report).splitlines()[0]
    assert report.to_dict()["left_float"]["have no integer form here"] == 3


def test_a_model_of_which_nothing_would_be_quantized_is_refused() -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    with pytest.raises(ConfigError, match="Nothing in this model is quantized") as caught:
        h.prepare_harmoq(convolutions, None, images(1)[0])
    assert "1 x conv2d: convolutions stay in float unless conv_bits asks for them" in str(caught.value.found)
    assert h.prepare_harmoq(convolutions, h.HarmoqConfig(conv_bits=8), images(1)[0]).sites()
    off = h.HarmoqConfig(32, 32)
    assert h.prepare_harmoq(built("tuple"), off, images(1)[0]).report().quantized == []
