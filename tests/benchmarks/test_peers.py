"""Peers of the benchmarks that are prepared for one size: right, and in bfloat16 at sizes they were not built for."""

from __future__ import annotations

import copy
import multiprocessing
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spandrel.architectures.DAT.__arch.DAT import Adaptive_Spatial_Attention
from spandrel.architectures.HAT import HAT
from spandrel.architectures.SwinIR.__arch.SwinIR import SwinTransformerBlock
from torch import Tensor, nn

from benchmarks import cpu_peers
from benchmarks.gpu import models
from benchmarks.gpu.contenders import CONTENDERS, Subject
from benchmarks.gpu.plan import Shape
from benchmarks.measuring import random_image
from benchmarks.peers import Core, Run, flex, for_size, padded_attention, sdpa, torchao_int8
from harmoq_ao.recipes.architectures import ARCHITECTURES

TINY = {"swinir-light": "SwinIR/light", "hat-s": "HAT", "dat-light": "DAT/light"}
"""Small instances of what `benchmarks.gpu` measures, built for images of 16x16."""
SIZES = ((24, 24), (16, 40), (20, 13))


def tiny(name: str) -> nn.Module:
    return next(entry for entry in ARCHITECTURES if entry.name == TINY[name]).build()


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether it is the same picture with the rounding of bfloat16."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    return bool((found - expected).abs().mean() < 0.03 * expected.std())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_masks_made_once_are_those_of_the_size(name: str, size: tuple[int, int], monkeypatch: Any) -> None:
    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("a mask is made anew")

    model, image = tiny(name), torch.rand(2, 3, *size)
    expected = model(image)
    prepared = for_size(model, size)
    for owner in (SwinTransformerBlock, HAT, Adaptive_Spatial_Attention):
        monkeypatch.setattr(owner, "calculate_mask", again)
    assert torch.equal(prepared(image), expected)


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name.startswith("bfloat16")])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_every_bfloat16_contender_on_a_gpu_is_close_to_float32(
    name: str, contender: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, **options, fullgraph=True))
    monkeypatch.setitem(models.MODELS, name, lambda _: tiny(name))
    subject = Subject(Shape(name, 2, 24, 32, 2), torch.device("cpu"), tmp_path)
    image = subject.image(0)
    assert close(CONTENDERS[contender](subject)(image), models.float_model(name, 2)(image))


@pytest.mark.parametrize("core", [sdpa, flex])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_attention_with_padded_heads_is_the_authors(core: Core, batch: int) -> None:
    model, image = for_size(tiny("swinir-light"), (24, 32)), torch.rand(batch, 3, 24, 32)
    expected = model(image)
    found = padded_attention(model, core)(image)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["swinir-light", "dat-light"])
@torch.no_grad()
def test_bfloat16_on_a_cpu_is_close_to_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_peers.Job, "build", lambda job: tiny(job.model))
    job, image = cpu_peers.Job(name, 24, Path()), random_image(24, 0)
    assert close(cpu_peers.CONTENDERS["bfloat16 eager"](job)(image), tiny(name)(image))


@torch.no_grad()
def test_torchao_takes_all_linears_but_those_of_one_input() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3), nn.Linear(3, 8))  # as in DAT's position biases
    image = torch.rand(5, 6)
    expected = model(image)
    found = torchao_int8(model)(image)
    assert [type(layer.weight) is nn.Parameter for layer in model] == [False, True, False]
    assert (found - expected).abs().max() < 0.05


def test_what_a_contender_failed_with_reaches_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    name, job = "torchao int8 dynamic", cpu_peers.Job("dat-light", 24, Path())
    ours, theirs = multiprocessing.Pipe()
    worker = cpu_peers.Worker.__new__(cpu_peers.Worker)
    worker.name, worker.pipe, worker.process = name, ours, SimpleNamespace(join=lambda: None, exitcode=-9)

    def broken(job: cpu_peers.Job) -> Run:
        raise RuntimeError("no kernel | for this\nsee elsewhere")

    monkeypatch.setitem(cpu_peers.CONTENDERS, name, broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        cpu_peers.serve(name, job, None, torch.get_num_threads(), theirs)
    with pytest.raises(RuntimeError, match=r"^RuntimeError: no kernel \| for this$"):
        worker.answer()
    theirs.close()
    with pytest.raises(RuntimeError, match=r"^torchao int8 dynamic ended with status -9$"):
        worker.answer()
    row = {"contender": name, "error": "RuntimeError: no kernel | for this"}
    about = {"model": "dat-light x2", "image": [1, 3, 24, 24], "rounds": 2}
    assert "| torchao int8 dynamic | RuntimeError: no kernel \\| for this |" in cpu_peers.markdown(about, [row])


def test_tables_without_a_yardstick() -> None:
    times = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "peak_mib": 5, "psnr_y": None}
    row = {"contender": "harmoq W8A8", **times, "speed_vs_float32_eager": 4.0}
    about = {"model": "dat-light x2", "image": [1, 3, 24, 24], "rounds": 2, "threads": 1, "isa": "avx2"}
    text = cpu_peers.markdown(about, [row])
    assert "## dat-light x2, 24x24 input, threads 1, held to avx2" in text
    assert "| harmoq W8A8 | 1.0 | 2.0 | 3.0 | 4.00 |  | 5 |  |" in text


def test_a_contender_answers_from_a_process_of_its_own() -> None:
    with closing(cpu_peers.Worker("float32 eager", cpu_peers.Job("swinir-light", 16, Path()), None, 1)) as worker:
        found = cpu_peers.measure(worker, [worker_named(name, worker) for name in cpu_peers.YARDSTICKS], 2, None)
    assert {len(seconds) for seconds in found["seconds"].values()} == {2}
    assert found["psnr_y"] is None
    assert found["p50_ms"] > 0


def worker_named(name: str, worker: cpu_peers.Worker) -> cpu_peers.Worker:
    """The same process under another name."""
    other = copy.copy(worker)
    other.name = name
    return other
