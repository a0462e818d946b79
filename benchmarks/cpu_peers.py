"""How fast are whole models on this CPU, ours and everybody else's, and what does each lose in PSNR?

Every contender runs in a process of its own. One contender at a time is measured against two yardsticks, float32 eager
and OpenVINO bfloat16: the three processes take turns, one call each per round, on the same fresh random image, and the
ratios are taken within rounds. A contender is done once; run the script again to go on where it stopped.

All that calibrate do so on the same crops. PSNR is of luma on Set5, in tiles of the size that is timed, for every
contender alike, since most of them take one size only.

    python -m benchmarks.cpu_peers --set5 data/Set5 --output benchmarks/results

Needs ``pip install "harmoq-ao[bench,demo]"``; a contender that does not work is recorded with its error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import harmoq_ao as h
from benchmarks.measuring import (
    environment,
    one_line,
    paired_ratio,
    percentiles,
    random_image,
    write_json,
)
from benchmarks.peers import Run, bfloat16_run, for_size, torchao_int8
from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.config import SiteRule
from harmoq_ao.images import CalibrationCrops, atomic_write, load_pairs, skimage_photographs
from harmoq_ao.recipes.charts import new_figure, save_figure, styled
from harmoq_ao.runtime.compiled import compile_model
from harmoq_ao.runtime.evaluation import evaluate
from harmoq_ao.runtime.openvino import lower_openvino
from harmoq_ao.runtime.tiling import pad_to_multiple

SCALE = 2
CROPS = 32
YARDSTICKS = ("float32 eager", "OpenVINO bf16")
PACKAGES = ("openvino", "nncf", "onnxruntime", "onnx", "torchao", "spandrel")
_FAILED = "failed: "
_SWINIR_LIGHT = {
    "upscale": SCALE,
    "img_size": 64,
    "window_size": 8,
    "depths": [6] * 4,
    "embed_dim": 60,
    "num_heads": [6] * 4,
    "mlp_ratio": 2,
    "upsampler": "pixelshuffledirect",
}


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        model: ``dat-light`` (trained weights) or ``swinir-light`` (random weights: no PSNR).
        size: Side of the image in pixels.
        work: Folder of quantized models, kept between contenders.
    """

    model: str
    size: int
    work: Path

    def build(self) -> nn.Module:
        """The float model."""
        if self.model == "dat-light":
            return h.load_demo_model(SCALE).model
        from spandrel.architectures.SwinIR import SwinIR

        torch.manual_seed(0)
        return SwinIR(**_SWINIR_LIGHT).eval()

    def crops(self) -> list[Tensor]:
        """Calibration crops `[3, size, size]`, the same for all."""
        photographs = list(skimage_photographs("calibration").values())
        return list(CalibrationCrops(photographs, size=self.size, count=CROPS, downscale=SCALE))


# --- contenders -------------------------------------------------------------------------------------------------------


def _eager(job: Job) -> Run:
    return job.build()


def _bfloat16(job: Job) -> Run:
    return bfloat16_run(for_size(job.build().bfloat16(), (job.size, job.size)))


def _compiled(job: Job) -> Run:
    return torch.compile(for_size(job.build(), (job.size, job.size)), dynamic=False)


def _compiled_bfloat16(job: Job) -> Run:
    model = for_size(job.build().bfloat16(), (job.size, job.size))
    return bfloat16_run(torch.compile(model, dynamic=False))


def _torchao(job: Job) -> Run:
    return torchao_int8(for_size(job.build(), (job.size, job.size)))


def _onnx_file(job: Job) -> Path:
    path = job.work / f"{job.model}-{job.size}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        torch.onnx.export(job.build(), (random_image(job.size, 0),), str(partial_path), opset_version=17, dynamo=False)
        partial_path.rename(path)
    return path


def _onnx_session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _onnx(job: Job) -> Run:
    return _onnx_session(_onnx_file(job))


def _onnx_int8(job: Job) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    source, target = _onnx_file(job), job.work / f"{job.model}-{job.size}-int8.onnx"
    name = _input_name(source)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(job.crops())

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {name: image[None].numpy()}

    kinds = ["MatMul", "Gemm"]
    formats = {"quant_format": QuantFormat.QDQ, "per_channel": True, "op_types_to_quantize": kinds}
    quantize_static(
        str(source),
        str(target),
        Reader(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
        **formats,
    )
    return _onnx_session(target)


def _input_name(path: Path) -> str:
    import onnx

    name: str = onnx.load(str(path)).graph.input[0].name
    return name


def _openvino_model(job: Job) -> Any:
    import openvino as ov

    image = random_image(job.size, 0)
    return ov.convert_model(job.build(), example_input=image, input=[ov.PartialShape(list(image.shape))])


def _openvino_run(model: Any, precision: str) -> Run:
    import openvino as ov

    threads = torch.get_num_threads()
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = ov.Core().compile_model(model, "CPU", options)
    return lambda x: torch.from_numpy(compiled(x.numpy(), share_inputs=True)[0])


def _openvino(job: Job, precision: str) -> Run:
    return _openvino_run(_openvino_model(job), precision)


def _nncf(job: Job, precision: str) -> Run:
    import nncf

    images = nncf.Dataset([crop[None].numpy() for crop in job.crops()])
    model = nncf.quantize(
        _openvino_model(job),
        images,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CROPS,
        fast_bias_correction=True,
    )
    return _openvino_run(model, precision)


def _quantized(job: Job, bits: int, per_token: bool = False) -> h.QuantizedModel:
    """Our model, from the work folder where it was made before."""
    folder = job.work / f"{job.model}-{job.size}-w{bits}a{bits}{'-token' if per_token else ''}"
    if not folder.exists():
        rules = [SiteRule(kind="linear", dynamic=True)] if per_token else []
        prepared = h.prepare_harmoq(job.build(), h.HarmoqConfig(bits, bits, rules=rules))
        h.save_quantized(h.convert_harmoq(h.calibrate(prepared, job.crops(), show_progress=False)), folder)
    return h.load_quantized(folder)


def _native(job: Job, bits: int) -> Run:
    quantized = _quantized(job, bits).set_float_dtype(torch.bfloat16)
    for_size(quantized.model, (job.size, job.size))
    return quantized


def _native_compiled(job: Job, bits: int) -> Run:
    return compile_model(_quantized(job, bits).set_float_dtype(torch.bfloat16), keep=1)


def _lowered(job: Job, bits: int, per_token: bool = False) -> Run:
    return lower_openvino(_quantized(job, bits, per_token), keep=1)


CONTENDERS: dict[str, Callable[[Job], Run]] = {
    "float32 eager": _eager,
    "bfloat16 eager": _bfloat16,
    "torch.compile float32": _compiled,
    "torch.compile bf16": _compiled_bfloat16,
    "torchao int8 dynamic": _torchao,
    "ONNX Runtime float32": _onnx,
    "ONNX Runtime int8": _onnx_int8,
    "OpenVINO float32": partial(_openvino, precision="f32"),
    "OpenVINO bf16": partial(_openvino, precision="bf16"),
    "NNCF int8": partial(_nncf, precision="f32"),
    "NNCF int8, bf16 rest": partial(_nncf, precision="bf16"),
    "harmoq W8A8": partial(_native, bits=8),
    "harmoq W4A4": partial(_native, bits=4),
    "harmoq W2A2": partial(_native, bits=2),
    "harmoq W8A8, torch.compile": partial(_native_compiled, bits=8),
    "harmoq W4A4, torch.compile": partial(_native_compiled, bits=4),
    "harmoq W2A2, torch.compile": partial(_native_compiled, bits=2),
    "harmoq W8A8, OpenVINO": partial(_lowered, bits=8),
    "harmoq W4A4, OpenVINO": partial(_lowered, bits=4),
    "harmoq W4A4 per token, OpenVINO": partial(_lowered, bits=4, per_token=True),
    "harmoq W2A2, OpenVINO": partial(_lowered, bits=2),
}


# --- one process per contender ----------------------------------------------------------------------------------------


def serve(name: str, job: Job, set5: Path | None) -> None:
    """Build a contender, then answer lines on standard input: ``run SEED`` with seconds, ``psnr`` with decibels."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not be taken for an answer
    try:
        for answer in _answers(name, job, set5):
            print(answer, file=answers, flush=True)
    except Exception as error:
        print(f"{_FAILED}{one_line(error)}", file=answers, flush=True)
        raise


@torch.no_grad()
def _answers(name: str, job: Job, set5: Path | None) -> Iterator[str | float]:
    model = CONTENDERS[name](job)
    model(random_image(job.size, 0))
    yield "ready"
    for line in sys.stdin:
        if line.startswith("run"):
            image = random_image(job.size, int(line.split()[1]))
            start = time.perf_counter()
            model(image)
            yield time.perf_counter() - start
        else:
            yield "nan" if set5 is None else _psnr(model, job, set5)


def _psnr(model: Run, job: Job, set5: Path) -> float:
    def fixed(image: Tensor) -> Tensor:
        padded, (height, width) = pad_to_multiple(image, job.size)
        return model(padded)[..., : height * SCALE, : width * SCALE]

    table = evaluate(fixed, load_pairs(set5, None, SCALE), SCALE, tile=job.size, overlap=16)
    return float(table.mean.psnr)


class Worker:
    """A contender in a process of its own; a context manager that ends it."""

    def __init__(self, name: str, job: Job, set5: Path | None, threads: int) -> None:
        given = ["--worker", name, "--model", job.model, "--size", str(job.size), "--work", str(job.work)]
        given += ["--threads", str(threads), *([] if set5 is None else ["--set5", str(set5)])]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu_peers", *given]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        """Until the contender is built.

        Raises:
            RuntimeError: It could not be; says why.
        """
        if self._answer() != "ready":
            raise RuntimeError(f"{self.name} gave an unexpected answer")

    def ask(self, question: str) -> float:
        """The answer to one line.

        Raises:
            RuntimeError: The contender failed; says why.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if line.startswith(_FAILED):
            raise RuntimeError(line.removeprefix(_FAILED))
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return line


def measure(name: str, yardsticks: list[Worker], job: Job, set5: Path | None, options: Any) -> dict[str, Any]:
    """Seconds per round of one contender and of the yardsticks beside it, as a result to store."""
    own = next((w for w in yardsticks if w.name == name), None)
    worker = own or Worker(name, job, set5, options.threads)
    try:
        if own is None:
            worker.wait()
        workers = {w.name: w for w in [*yardsticks, worker]}
        times: dict[str, list[float]] = {key: [] for key in workers}
        for index in range(options.rounds + 2):
            for key, each in workers.items():
                seconds = each.ask(f"run {index + 1}")
                if index >= 2:  # the first rounds warm up
                    times[key].append(seconds)
        found: dict[str, Any] = percentiles(times[name])
        for key in YARDSTICKS:
            found[f"speed_vs_{key.replace(' ', '_')}"] = round(paired_ratio(times[key], times[name]), 3)
        found["psnr_y"] = None if set5 is None else round(worker.ask("psnr"), 3)
        return {**found, "seconds": times}
    finally:
        if own is None:
            worker.__exit__()


# --- results ----------------------------------------------------------------------------------------------------------


def run(job: Job, options: Any) -> dict[str, Any]:
    """Measure what is not measured yet, storing after each contender."""
    path = options.output / f"cpu_peers_{job.model}.json"
    set5 = options.set5 if job.model == "dat-light" else None
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": {}}
    missing = [name for name in options.contenders if "p50_ms" not in found["results"].get(name, {})]
    if not missing:
        return found
    found |= {"model": f"{job.model} x{SCALE}", "image": [1, 3, job.size, job.size], "rounds": options.rounds}
    found |= {"calibration_crops": CROPS, **environment(PACKAGES)}
    yardsticks = [Worker(name, job, set5, options.threads) for name in YARDSTICKS]
    try:
        for worker in yardsticks:
            worker.wait()
        for name in missing:
            try:
                found["results"][name] = measure(name, yardsticks, job, set5, options)
            except (RuntimeError, ValueError) as error:
                found["results"][name] = {"error": str(error)}
            write_json(path, found)
            print(name, {k: v for k, v in found["results"][name].items() if k != "seconds"}, flush=True)
    finally:
        for worker in yardsticks:
            worker.__exit__()
    return found


def markdown(found: dict[str, Any]) -> str:
    """The results as a table with what they were measured on."""
    keys = ("cpu", "threads", "torch", *PACKAGES)
    lines = [
        f"## {found['model']}, {found['image'][2]}x{found['image'][3]} input",
        "",
        ", ".join(f"{key} {found.get(key)}" for key in keys) + f"; {found['rounds']} rounds.",
        "",
        "| contender | p20 ms | p50 ms | p80 ms | vs float32 eager | vs OpenVINO bf16 | PSNR dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [n for n in CONTENDERS if n in found["results"]]:
        row = found["results"][name]
        if "error" in row:
            reason = row["error"].replace("|", "\\|")
            lines.append(f"| {name} | {reason} | | | | | |")
            continue
        values = [row[key] for key in ("p20_ms", "p50_ms", "p80_ms")]
        values += [f"{row[f'speed_vs_{key.replace(chr(32), chr(95))}']:.2f}" for key in YARDSTICKS]
        values.append("" if row["psnr_y"] is None else f"{row['psnr_y']:.3f}")
        lines.append("| " + " | ".join(map(str, [name, *values])) + " |")
    return "\n".join(lines) + "\n"


@styled
def chart(found: dict[str, Any], path: Path) -> None:
    """Bars of the speed against float32 eager, the PSNR beside them."""
    rows = {n: found["results"][n] for n in reversed(CONTENDERS) if "p50_ms" in found["results"].get(n, {})}
    figure = new_figure(7.0, 0.32 * len(rows) + 0.9)
    axis = figure.subplots()
    speeds = [row["speed_vs_float32_eager"] for row in rows.values()]
    ours = ["#c2410c" if name.startswith("harmoq") else "#94a3b8" for name in rows]
    axis.barh(np.arange(len(rows)), speeds, color=ours)
    axis.set_yticks(np.arange(len(rows)), list(rows))
    for index, (speed, row) in enumerate(zip(speeds, rows.values(), strict=True)):
        quality = "" if row["psnr_y"] is None else f", {row['psnr_y']:.2f} dB"
        axis.text(speed, index, f" {speed:.2f}x{quality}", va="center", fontsize=8)
    axis.set_xlim(0, 1.3 * max(speeds))
    axis.set_xlabel(f"speed against float32 eager, {found['model']}, {found['threads']} threads")
    save_figure(figure, path)


def write_pages(folder: Path) -> None:
    """Markdown and charts of all results in a folder."""
    pages = []
    for path in sorted(folder.glob("cpu_peers_*.json")):
        found = json.loads(path.read_text())
        pages.append(markdown(found))
        if any("p50_ms" in row for row in found["results"].values()):
            chart(found, path.with_suffix(".png"))
    with atomic_write(folder / "cpu_peers.md") as file:
        file.write(("# Whole models on a CPU\n\n" + "\n".join(pages)).encode())


def main() -> None:
    """Measure, and write JSON, Markdown and a chart; or serve as one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=("dat-light", "swinir-light"), action="append")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contenders", type=lambda text: text.split(";"), default=list(CONTENDERS), help="A;B;C")
    parser.add_argument("--set5", type=Path, help="benchmark root with HR and LR_bicubic/X2")
    parser.add_argument("--work", type=Path, default=Path("build/cpu_peers"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    names = options.model or ["dat-light", "swinir-light"]
    if options.worker:
        serve(options.worker, Job(names[0], options.size, options.work), options.set5)
        return
    _check_names(options.contenders)
    for name in names:
        run(Job(name, options.size, options.work), options)
    write_pages(options.output)


def _check_names(names: list[str]) -> None:
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise SystemExit(f"Unknown contenders: {', '.join(unknown)}. Known: {'; '.join(CONTENDERS)}")


if __name__ == "__main__":
    main()
