"""What each kind of step does, in a process of its own: one function for each, from the subject to a row of results."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu.contenders import CONTENDERS, Subject
from benchmarks.gpu.models import FUSED, crop, float_model, fused, quantized_model
from benchmarks.gpu.plan import BASE, MAIN, TINY, Step, shapes
from benchmarks.gpu.problems import checks, compare, timings
from benchmarks.gpu.results import ROOT, STAND_IN
from benchmarks.gpu.stand_in import is_stand_in, mend
from benchmarks.measuring import one_line, paired_ratio, percentiles, version_of
from benchmarks.peers import Run
from harmoq_ao.common.errors import InputError
from harmoq_ao.recipes import store

PACKAGES = ("triton", "torchao", "spandrel")
ROUNDS = 30
SECONDS = 25.0
"""Rounds end after so many, however few they were, but for the first three."""

_LOSS = 0.5  # dB that the GPU may lose to the CPU reference: bfloat16 rounds in another order


def perform(step: Step, work: Path) -> dict[str, Any]:
    """Do a step.

    Args:
        step: From `plan`.
        work: Folder for saved models.
    """
    kinds: dict[str, Callable[[str, Path], dict[str, Any]]] = {
        "device": _device,
        "check": _check,
        "compile": _compile,
        "sanitize": _sanitize,
        "prepare": _prepare,
        "agree": _agree,
        "time": _time,
        "model": _model,
    }
    torch.set_num_threads(min(4, torch.get_num_threads()))  # others run beside it
    os.environ.setdefault("HARMOQ_CPU_KERNELS", "off")  # nothing is timed on the CPU, and building them takes a minute
    if is_stand_in():
        mend()
    with torch.no_grad():
        return kinds[step.kind](step.subject, work)


def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cpu" if is_stand_in() else "cuda")


def sanitizer() -> str | None:
    """The path of compute-sanitizer, or None where there is none."""
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


# --- one function for each kind ---------------------------------------------------------------------------------------


def _device(subject: str, work: Path) -> dict[str, Any]:
    """The environment: what results depend on besides our sources.

    Raises:
        InputError: There is no GPU, nor the stand-in.
    """
    about = store.environment("cpu") | {name: version_of(name) for name in PACKAGES}
    if is_stand_in():
        return about | {"gpu": STAND_IN}
    if not torch.cuda.is_available():
        raise InputError(
            "There is no GPU here", found="torch.cuda.is_available() is false", expected="a GPU that torch sees",
            remedy="TRITON_INTERPRET=1 runs every step on tiny problems without one",
        )  # fmt: skip
    torch.zeros(1, device="cuda")  # a driver that lists the GPU may still refuse it
    found = torch.cuda.get_device_properties(0)
    about |= {"gpu": found.name, "capability": f"{found.major}.{found.minor}", "memory_mb": found.total_memory // 10**6}
    return about | {"cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _check(subject: str, work: Path) -> dict[str, Any]:
    problem = checks(is_stand_in())[subject]
    call = problem.make(device())
    found = call.run()
    again = torch.equal(found.nan_to_num(), call.run().nan_to_num())
    row = compare(found, call.reference(), problem.exact)
    return row | {"ok": row["ok"] and again, "repeats": again}


def _compile(subject: str, work: Path) -> dict[str, Any]:
    """One call of a kernel or contender that will be timed: what is compiled is kept for the process that times it."""
    if subject in (problems := timings(is_stand_in())):
        problems[subject].make(device()).run()
    else:
        about, contender = _subject(subject, work)
        CONTENDERS[contender](about)(about.image(0))
    _wait()
    return {}


def _sanitize(subject: str, work: Path) -> dict[str, Any]:
    tool = sanitizer()
    assert tool is not None, "there are no such steps without it"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run([*command, "--one", f"check/{subject}"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if done.returncode == 0:
        return {}
    lines = [line.strip("= \n") for line in (done.stdout + done.stderr).splitlines() if line.startswith("=====")]
    return {"ok": False, "error": f"status {done.returncode}: {'; '.join(lines[:4])}"[:300]}


def _prepare(subject: str, work: Path) -> dict[str, Any]:
    quantized_model(*_model_of(subject), work)
    return {}


def _agree(subject: str, work: Path) -> dict[str, Any]:
    """The model on the GPU loses no more against the float model than it does in plain integers on the CPU."""
    name, scale, bits = _model_of(subject)
    quantized = quantized_model(name, scale, bits, work)
    image = crop(7, (16, 16) if is_stand_in() else (48, 56))
    expected = float_model(name, scale)(image)
    quantized.use_reference()
    reference = psnr(quantized(image), expected)
    quantized.use_backend("triton" if is_stand_in() else "auto")
    counts = fused(quantized)
    found = psnr(quantized.to(device())(image.to(device())).cpu(), expected)
    least = FUSED.get(name, {})
    ok = found >= reference - _LOSS and all(counts.get(kind, 0) >= count for kind, count in least.items())
    return {"ok": ok, "psnr_db": found, "reference_psnr_db": reference, "fused": counts, "fused_at_least": least}


def _time(subject: str, work: Path) -> dict[str, Any]:
    """Milliseconds of a kernel: from a cold cache (`do_bench`), and back to back in a CUDA graph."""
    if subject == "device":
        return _rates()
    call = timings(is_stand_in())[subject].make(device())
    work_done = {"bytes": call.bytes, "int8_macs": call.int8, "float16_macs": call.float16}
    if is_stand_in():
        return work_done | {"p50_ms": _milliseconds(call.run)}
    names = ("p20_ms", "p50_ms", "p80_ms")
    quantiles = triton.testing.do_bench(call.run, warmup=20, rep=80, quantiles=[0.2, 0.5, 0.8])
    graph = triton.testing.do_bench_cudagraph(call.run, rep=20)
    return work_done | dict(zip(names, quantiles, strict=True)) | {"graph_ms": graph}


def _rates() -> dict[str, Any]:
    """What the device reaches: bytes copied (read and written), multiply-adds of bfloat16 and int8, a second."""
    place, side = device(), 256 if is_stand_in() else 8192
    source = torch.empty(4 * side * side, dtype=torch.float32, device=place)
    target = torch.empty_like(source)
    floats = torch.randn(side, side, device=place, dtype=torch.bfloat16)
    codes = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=place)
    copied = 2 * source.nbytes / _milliseconds(partial(target.copy_, source)) * 1e3
    rows = {"copied_bytes_per_s": copied}
    for name, product in (("bfloat16", lambda: floats @ floats), ("int8", lambda: torch._int_mm(codes, codes.T))):
        rows[f"{name}_macs_per_s"] = side**3 / _milliseconds(product) * 1e3
    return rows


def _milliseconds(run: Callable[[], Any]) -> float:
    if not is_stand_in():
        return float(triton.testing.do_bench(run, return_mode="median"))
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def _model(subject: str, work: Path) -> dict[str, Any]:
    """A contender, in turns with float32 eager on the same fresh images."""
    about, contender = _subject(subject, work)
    image = about.image(0)
    free = _free()
    start = time.perf_counter()
    run = CONTENDERS[contender](about)
    for _ in range(3):
        run(image)
    _wait()
    row: dict[str, Any] = {"built_s": time.perf_counter() - start} | _memory(run, image, free) | _compiler()
    try:
        base = CONTENDERS[BASE](about)
        expected = base(image)
        row["psnr_db"] = psnr(run(image), expected)
    except torch.OutOfMemoryError as error:  # the contender is measured all the same
        return _turns({contender: run}, about, contender) | row | {"base_error": one_line(error)}
    ok = not math.isnan(row["psnr_db"]) and row["psnr_db"] > 10
    return {"ok": ok} | _turns({BASE: base, contender: run}, about, contender) | row


def _turns(runs: dict[str, Run], about: Subject, contender: str) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds, started = (3 if is_stand_in() else ROUNDS), time.monotonic()
    for index in range(rounds + 2):
        image = about.image(index)
        for name, run in runs.items():
            seconds = _seconds(run, image)
            if index >= 2:  # the first rounds warm up
                times[name].append(seconds)
        if time.monotonic() - started > SECONDS and len(times[contender]) >= 3:
            break
    row: dict[str, Any] = percentiles(times[contender]) | {"rounds": len(times[contender])}
    if BASE in times:
        row["base_p50_ms"] = 1000 * statistics.median(times[BASE])
        row["speed_vs_float32_eager"] = paired_ratio(times[BASE], times[contender])
    return row


def _seconds(run: Run, image: Tensor) -> float:
    """Of one call, from an idle device to an idle device."""
    _wait()
    start = time.perf_counter()
    run(image)
    _wait()
    return time.perf_counter() - start


def _memory(run: Run, image: Tensor, free: int) -> dict[str, Any]:
    """MB that a call holds at its peak, weights and the pools of CUDA graphs included.

    ``peak_mb`` is what the device has less than before the contender was made, ``reserved_mb`` torch's own count.
    """
    if is_stand_in():
        return {}
    torch.cuda.empty_cache()  # what building took and a call does not; a graph's pool stays
    torch.cuda.reset_peak_memory_stats()
    run(image)
    _wait()
    return {"peak_mb": (free - _free()) / 1e6, "reserved_mb": torch.cuda.max_memory_reserved() / 1e6}


def _compiler() -> dict[str, int]:
    """Graphs that torch.compile made and the breaks between them; none where nothing was compiled."""
    counters: Any = torch._dynamo.utils.counters
    graphs = int(counters["stats"]["unique_graphs"])
    return {"graphs": graphs, "graph_breaks": sum(counters["graph_break"].values())} if graphs else {}


def _free() -> int:
    if is_stand_in():
        return 0
    torch.zeros(1, device="cuda")  # the context is no part of what a contender takes
    _wait()
    return torch.cuda.mem_get_info()[0]


def _wait() -> None:
    if not is_stand_in():
        torch.cuda.synchronize()


def psnr(found: Tensor, expected: Tensor) -> float:
    """Of images in 0..1, in dB; NaN where one holds NaN or infinities."""
    error = float((found.double() - expected.double()).square().mean())
    if not math.isfinite(error):
        return math.nan
    return 10 * math.log10(1 / max(error, 1e-12))


def _subject(subject: str, work: Path) -> tuple[Subject, str]:
    """Shape and contender of ``swinir-light x2 256x256 b1/W8A8``."""
    shape, contender = subject.split("/")
    known = {each.name: each for each in (MAIN, TINY, *shapes())}
    return Subject(known[shape], device(), work), contender


def _model_of(subject: str) -> tuple[str, int, int]:
    """Name, scale and bits of ``swinir-light x2 w8``."""
    name, scale, bits = subject.split(" ")
    return name, int(scale[1:]), int(bits[1:])


__all__ = ["device", "perform", "psnr", "sanitizer"]
